"""What a conversion did, or would do: the value that the Python API returns and the reports show."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from normconvert import __version__
from normconvert.options import Stage

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan
    from normconvert.verification.fidelity import Fidelity


@dataclass(frozen=True, repr=False)
class Report:
    """What a conversion did, or would do.

    Attributes:
        source: what the user named.
        library: ``transformers`` or ``timm``.
        architecture: class or model name.
        method: the conversion.
        out: the output folder; None for a dry run or an inspection.
        plan: tensor edits, module edits and a verdict for every norm.
        fidelity: the three figures, or None if not verified.
        dtype: dtype of the source's weights.
        stored: dtype that the output's weights are stored in.
        uploaded: the repository on the hub that has the output, too.
        bytes_written: size of the weight files written.
        tensors_edited: how many tensors were edited or added.
        tensors_copied: how many were copied as they were.
        seconds: stage -> seconds it took.
        notes: sentences for the user.
        others: a sentence for each kind of norm that the conversion is not about; of an inspection, or of a model that
            has no other.
        factory: ``FILE.py:FACTORY`` as it was given, for a model of neither library.
        options: the options of the conversion, with their defaults, by the names of the Python API.
    """

    source: str
    library: str
    architecture: str
    method: str
    out: str | None
    plan: Plan
    fidelity: Fidelity | None = None
    dtype: str = ""
    stored: str = ""
    uploaded: str | None = None
    bytes_written: int = 0
    tensors_edited: int = 0
    tensors_copied: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    factory: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def converted(self) -> int:
        """Number of norms converted."""
        return len(self.plan.converted)

    @property
    def total(self) -> int:
        """Number of norms with a verdict."""
        return len(self.plan.verdicts)

    def __repr__(self) -> str:
        what = f"{self.source} → {self.out}" if self.out else self.source
        lines = [f"Report({what}: {self.method}, {self.converted} of {self.total} norms converted"]
        for code, count in Counter(verdict.code for verdict in self.plan.kept).items():
            lines.append(f"  {count} {'stays' if count == 1 else 'stay'}: {code}")
        if self.fidelity is not None:
            word = "verified" if self.fidelity.passed else "differs"
            lines.append(f"  {word} ({self.fidelity.level}): {self.fidelity.algebra:.1e} off in float64")
        return "\n".join(lines) + ")"

    def _repr_html_(self) -> str:
        """For notebooks: the content of the HTML report."""
        # By its name: what a person sees knows the results, and not the other way round.
        page: str = import_module("normconvert.report.notebook").in_frame(self)
        return page

    def to_records(self) -> list[dict[str, Any]]:
        """One row a norm, in the order of execution: ``path``, ``kind``, ``converted``, ``code``, ``reason``.

        ``pandas.DataFrame(report.to_records())`` is a table of them.
        """
        return [asdict(verdict) for verdict in self.plan.verdicts]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        data = {k: v for k, v in self.__dict__.items() if k not in ("plan", "fidelity")}
        return data | {
            "normconvert": __version__,
            "norms": {"converted": self.converted, "total": self.total},
            "plan": self.plan.to_json(),
            "fidelity": self.fidelity.to_json() if self.fidelity else None,
        }


class Clock:
    """Tells which stage begins, and how long each took."""

    def __init__(self, say: Stage | None) -> None:
        self.say, self.times = say, [("", time.perf_counter())]

    def __call__(self, name: str) -> None:
        """A stage begins, and the one before it ends."""
        self.times.append((name, time.perf_counter()))
        if self.say is not None:
            self.say(name)

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds; a stage that came twice counts once, with both."""
        ends = [at for _, at in self.times[1:]] + [time.perf_counter()]
        found: dict[str, float] = {}
        for (name, start), end in zip(self.times, ends, strict=True):
            if name:
                found[name] = found.get(name, 0.0) + end - start
        return found
