"""What was measured: one row a workload and mode, as data and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from normconvert.benchmark.timing import Spread, spread

ORIGINAL, CONVERTED, BOUND = "original", "converted", "bound"
WORTH = 1.03
"""A bound above this leaves enough room to say how much of the way a conversion goes."""
SHARP = 0.5
"""By how much that share may differ between the quartiles of the times, to be said at all."""


@dataclass(frozen=True)
class Row:
    """One workload in one mode.

    Attributes:
        mode: ``eager``, ``compiled`` or ``graphs``.
        kind: ``forward`` or ``decode``.
        batch: rows.
        length: tokens; None for a model without text.
        milliseconds: version (original, converted, bound) -> time of a call.
        speedup: version -> time of the original divided by its own, round by round.
        peak_bytes: version -> memory that a call takes beyond the parameters; None where the device does not tell.
        rounds, calls: how many samples, and of how many calls in a row each is the mean.
        failures: version -> why it could not be measured.
    """

    mode: str
    kind: str
    batch: int
    length: int | None
    milliseconds: dict[str, Spread] = field(default_factory=dict)
    speedup: dict[str, Spread] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    rounds: int = 0
    calls: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``forward 8 × 512``, and the mode if it is not eager."""
        size = f"{self.batch}" + (f" × {self.length}" if self.length is not None else "")
        return f"{self.kind} {size}" + (f" {self.mode}" if self.mode != "eager" else "")

    @property
    def share(self) -> float | None:
        """How much of the way to the bound the conversion goes; None where the times do not tell.

        They do if even the bound's lower quartile is above :data:`WORTH`, the share is the same to :data:`SHARP`
        whichever quartiles it is computed from, and it may be one: from 0 to 1.
        """
        bound, converted = self.speedup.get(BOUND), self.speedup.get(CONVERTED)
        if bound is None or converted is None or bound.low <= WORTH:
            return None
        shares = [share_of(c, b) for c in (converted.low, converted.high) for b in (bound.low, bound.high)]
        if max(shares) - min(shares) > SHARP or max(shares) < 0 or min(shares) > 1:
            return None
        return share_of(converted.median, bound.median)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**asdict(self), "share": self.share}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of :meth:`to_json`."""
        data = {key: value for key, value in data.items() if key != "share"}
        for key in ("milliseconds", "speedup"):
            data[key] = {name: Spread(**value) for name, value in data[key].items()}
        return cls(**data)


def share_of(converted: float, bound: float) -> float:
    """The time that a conversion saves as a part of what it could save, both given as speed-ups."""
    return (1 - 1 / converted) / (1 - 1 / bound)


def row_of(
    mode: str,
    kind: str,
    batch: int,
    length: int | None,
    times: Mapping[str, list[float]],
    calls: int,
    peak_bytes: Mapping[str, int | None],
    failures: Mapping[str, str],
) -> Row:
    """A row from the seconds of each version, round by round."""
    base = times[ORIGINAL]
    speedup = {
        name: spread([a / b for a, b in zip(base, own, strict=True)]) for name, own in times.items() if own is not base
    }
    milliseconds = {name: spread([1000 * t for t in own]) for name, own in times.items()}
    return Row(mode, kind, batch, length, milliseconds, speedup, dict(peak_bytes), len(base), calls, dict(failures))


@dataclass(frozen=True)
class Benchmark:
    """What `normconvert.bench` returns.

    Attributes:
        source: what the user named.
        converted: the converted folder, or None.
        library: ``transformers`` or ``timm``.
        architecture: class or model name.
        method: the conversion whose norms the bound lacks.
        norms: how many norms that conversion changes, and how many the model has.
        device: where it ran.
        dtype: of the parameters.
        machine: processor, GPU, threads and versions.
        parameter_bytes: version -> bytes of its parameters and buffers.
        rows: the measurements.
    """

    source: str
    converted: str | None
    library: str
    architecture: str
    method: str
    norms: dict[str, int]
    device: str
    dtype: str
    machine: dict[str, Any]
    parameter_bytes: dict[str, int]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**self.__dict__, "rows": [row.to_json() for row in self.rows]}
