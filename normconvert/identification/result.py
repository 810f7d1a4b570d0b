"""What an identification found: the values that the Python API returns and the command shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stated:
    """An architecture that the checkpoint, or its owner by the file's name, states.

    Attributes:
        where: ``metadata architecture``, ``entry arch``, ``file name``, ``folder name``, ``config.json``,
            ``normconvert.json``.
        name: what it says, without an organisation and a tag.
    """

    where: str
    name: str


@dataclass(frozen=True)
class Candidate:
    """An architecture whose tensors have exactly the names and shapes of the checkpoint.

    Attributes:
        library: ``timm`` or ``transformers``.
        name: timm's model name, or transformers' model type.
        num_classes: what the head says; 0 for none. For transformers None.
        classes: transformers' classes with this set of names.
        config: transformers' configuration values that names and shapes fix; a product such as
            ``num_attention_heads * head_dim`` where they fix no more than that.
        unfixed: configuration values that change no name and no shape, so that nothing in the file tells them.
    """

    library: str
    name: str
    num_classes: int | None = None
    classes: tuple[str, ...] = ()
    config: dict[str, int | bool] = field(default_factory=dict)
    unfixed: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``timm:NAME`` or ``transformers:TYPE``."""
        return f"{self.library}:{self.name}"


@dataclass(frozen=True)
class Near:
    """An architecture that the checkpoint resembles, and what differs.

    Attributes:
        names: the architectures that differ from it in the same way.
        missing: tensors that they have and the checkpoint has not.
        extra: tensors that the checkpoint has and they have not.
        reshaped: (tensor, shape in the checkpoint, their shape).
        arguments: name -> the arguments of ``timm.create_model`` with which it fits exactly, where that is proved.
        hint: what may explain the difference.
        classes: transformers' classes that differ in this way.
    """

    library: str
    names: tuple[str, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, Shape, Shape], ...] = ()
    arguments: dict[str, dict[str, int]] = field(default_factory=dict)
    hint: str = ""
    classes: tuple[str, ...] = ()

    @property
    def differences(self) -> int:
        """How many tensors differ."""
        return len(self.missing) + len(self.extra) + len(self.reshaped)


@dataclass(frozen=True)
class Identification:
    """Which architectures a checkpoint's names and shapes belong to.

    Attributes:
        path: what was identified.
        tensors: how many tensors it holds.
        exact: every architecture that fits. Several compute differently, and nothing in names and shapes tells which.
        nearest: if none fits, those that differ least.
        stated: what the checkpoint or its file name says of its architecture.
        notes: sentences for the user.
        prefix: what all names begin with, where they fit without it alone.
        origin: whose names these are, if they fit nothing here: another library's, in words.
    """

    path: str
    tensors: int
    exact: tuple[Candidate, ...] = ()
    nearest: tuple[Near, ...] = ()
    stated: tuple[Stated, ...] = ()
    notes: tuple[str, ...] = ()
    prefix: str = ""
    origin: str = ""

    @property
    def chosen(self) -> Candidate | None:
        """The one that fits, or of several the one that is stated (if all statements agree); else None."""
        if len(self.exact) == 1:
            return self.exact[0]
        # Statements that name two of them cancel each other: a wrong architecture loads without a word.
        said = [c for c in self.exact if any(s.name == c.name for s in self.stated)]
        return said[0] if len(said) == 1 else None

    @property
    def arch(self) -> str | None:
        """The value for ``--arch``, if one timm architecture is chosen."""
        found = self.chosen
        return found.label if found is not None and found.library == "timm" else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "path": self.path,
            "tensors": self.tensors,
            "arch": self.arch,
            "exact": [vars(c) for c in self.exact],
            "nearest": [vars(n) | {"differences": n.differences} for n in self.nearest],
            "stated": [vars(s) for s in self.stated],
            "notes": list(self.notes),
            "prefix": self.prefix,
            "origin": self.origin,
        }
