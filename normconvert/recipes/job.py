"""What passes between the stages of a batch: a job, what is heard of it while it runs, and how it ended.

All of it is plain data, since jobs run in other processes and on other machines.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from normconvert.errors import FidelityError, InputError, NothingToConvert
from normconvert.options import ROTATIONS

Status = Literal["converted", "skipped", "failed", "interrupted"]

SEVERITY = (
    0,
    NothingToConvert.exit_status,
    InputError.exit_status,
    FidelityError.exit_status,
    130,
)
"""Exit statuses from the best to the worst: a wrong result is worse than a bad input, that worse than nothing to do."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Attributes:
        cpus: cores, on a cluster.
        gpus: of the node that runs it, on a cluster.
        memory: bytes at the peak; 0: not known.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Upload:
    """Where a finished output is uploaded on the hub: a repository and whether it is made a private one."""

    repo: str
    private: bool = True


@dataclass(frozen=True)
class Job:
    """One conversion, with nothing left open.

    Attributes:
        source: as :func:`normconvert.convert` takes it; a path is absolute.
        name: the source's short name, for people and for the output's name.
        variant: the entry of the matrix; the method if there is none.
        output: a local folder (absolute) or an fsspec URL.
        where: the entry of the recipe that asks for it, ``file:line:column``.
        method: the conversion.
        options: fields of :class:`normconvert.options.Options`, all of them.
        revision: commit on the hub.
        branch: the branch, tag or commit that the recipe asks for; None: the default branch, or not from the hub.
        arch: architecture of bare weights.
        files: ``variant`` in ``convert``.
        weights: as in ``convert``.
        dtype: as in ``convert``.
        max_shard_size: bytes; None: as the source.
        require_all: as in ``convert``.
        trust_remote_code: as in ``convert``.
        verify: check the result before it appears.
        device: where the verification runs.
        limits: figure -> limit, narrower than the defaults.
        resources: what it needs.
        upload: where to; None: nowhere.
        redo: do it even if the output is there already.
        run: identifies the batch, so that a second attempt knows the first one's result.
        size: bytes of the source's weights; None: not known.
    """

    source: str
    name: str
    variant: str
    output: str
    where: str
    method: str
    options: dict[str, Any]
    revision: str | None = None
    branch: str | None = None
    arch: str | None = None
    files: str | None = None
    weights: str | None = None
    dtype: str = "auto"
    max_shard_size: int | None = None
    require_all: bool = False
    trust_remote_code: bool = False
    verify: bool = True
    device: str = "cpu"
    limits: dict[str, float] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    upload: Upload | None = None
    redo: bool = False
    run: str = ""
    size: int | None = None

    @property
    def label(self) -> str:
        """The job's name in tables: the source, and the variant."""
        return f"{self.name} {self.variant}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the source that the bytes of the output may depend on."""
        # What is seldom said stands there if it is: records of before have no such entry.
        chosen = {"variant": self.files, "weights": self.weights}
        return {
            "method": self.method,
            **self.options,
            **self._rotation,
            "arch": self.arch,
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            "require_all": self.require_all,
            "trust_remote_code": self.trust_remote_code,
            **{name: value for name, value in chosen.items() if value is not None},
        }

    @property
    def _rotation(self) -> dict[str, str]:
        """What the file of the rotation holds, if it is one that can be read here."""
        rotation = self.options.get("rotation", ROTATIONS[0])
        if rotation in ROTATIONS:
            return {}
        from normconvert.plan.given_rotations import read_rotation  # torch comes with it

        with suppress(InputError):  # the job itself will tell
            return {"rotation": read_rotation(rotation).text}
        return {}

    def to_json(self) -> dict[str, Any]:
        """The job as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """The inverse of :meth:`to_json`."""
        job = cls(**data)
        upload = Upload(**data["upload"]) if data["upload"] else None
        return replace(job, resources=Resources(**data["resources"]), upload=upload)


@dataclass(frozen=True)
class Result:
    """How a job ended.

    Attributes:
        status: ``converted``, ``skipped`` (it was there already), ``failed`` or ``interrupted``.
        exit_status: as the command for this one conversion would end with.
        message: why it failed, or why it was skipped.
        kind: class of the error, if it failed.
        seconds: what it took, from start to end.
        norms: how many norms were converted, and of how many.
        figures: of the verification, by name.
        bytes_written: size of the weight files.
        uploaded: where to.
        notes: sentences for the user.
        place: what ran it: a worker of this machine, or a node of a cluster.
        attempts: how often it was started.
    """

    status: Status
    exit_status: int = 0
    message: str = ""
    kind: str = ""
    seconds: float = 0.0
    norms: tuple[int, int] | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    bytes_written: int = 0
    uploaded: str | None = None
    notes: tuple[str, ...] = ()
    place: str = ""
    attempts: int = 1

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of :meth:`to_json`."""
        norms = data.get("norms")
        return cls(**{**data, "norms": tuple(norms) if norms else None, "notes": tuple(data.get("notes", ()))})


@dataclass(frozen=True)
class Event:
    """Something that happened to a job while the batch ran.

    Attributes:
        job: its index in the batch.
        kind: ``start`` (``place``), ``stage`` (``name``), ``progress`` (``done``, ``total`` in bytes), ``log``
            (``text``), ``retry`` (``why``) or ``end`` (``result``).
        data: as said for the kind.
    """

    job: int
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


def worst(statuses: list[int]) -> int:
    """The worst of several exit statuses; 0 for none."""
    return max(statuses, key=lambda status: SEVERITY.index(status) if status in SEVERITY else -1, default=0)
