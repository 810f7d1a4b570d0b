"""Limits that a user sets on the figures of a verification: read from YAML, held against what was found.

    algebra: 1e-10          # at most
    rounding: 2
    top1: 0.999             # at least
    kl: 1e-6
    loss_difference: 1e-4   # either way
    mean_over_rms: 1e-2

A limit replaces the figure's default; `algebra` and `rounding` have one, the others are only reported without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError
from normconvert.files.yaml_file import nearest, read_yaml

if TYPE_CHECKING:
    from normconvert.verification.fidelity import Fidelity


@dataclass(frozen=True)
class Figure:
    """One figure of a :class:`normconvert.verification.fidelity.Fidelity`.

    Attributes:
        name: the attribute's, and the key in a limits file.
        words: what it is, for a person.
        at_least: the limit is the smallest value allowed, not the largest.
        largest: the largest value that makes sense as a limit.
        default: the attribute of the fidelity that holds its limit where the user sets none.
    """

    name: str
    words: str
    at_least: bool = False
    largest: float = math.inf
    default: str | None = None


FIGURES: tuple[Figure, ...] = (
    Figure("algebra", "relative error in float64", default="tolerance"),
    Figure("rounding", "rounding error ÷ the original's", default="rounding_tolerance"),
    Figure("top1", "share of equal top classes", at_least=True, largest=1.0),
    Figure("kl", "KL divergence (nats)"),
    Figure("loss_difference", "next-token loss, converted − original (nats)"),
    Figure("mean_over_rms", "|mean|/rms at the converted norms"),
)
"""What a verification measures, in the order it is shown."""


@dataclass(frozen=True)
class Outcome:
    """A figure against its limit.

    Attributes:
        figure: which.
        found: its value; None if it was not measured.
        limit: the limit; None if there is none.
        passed: whether it is kept; None if there is nothing to keep.
    """

    figure: Figure
    found: float | None
    limit: float | None
    passed: bool | None

    @property
    def bound(self) -> str:
        """``at most 2`` or ``at least 0.999``; empty without a limit."""
        return "" if self.limit is None else f"at {'least' if self.figure.at_least else 'most'} {self.limit:g}"

    @property
    def value(self) -> str:
        """The figure for a person."""
        return (
            "not measured"
            if self.found is None
            else f"{self.found:.6g}"
            if self.figure.at_least
            else f"{self.found:.3g}"
        )

    @property
    def sentence(self) -> str:
        """What is wrong, for one that failed."""
        return f"{self.figure.name} is {self.value}, allowed: {self.bound} ({self.figure.words})"


def read_limits(path: str | Path) -> dict[str, float]:
    """The limits of a YAML file.

    Raises:
        InputError: names the line and column of what is wrong: an unknown key (and the nearest one), or a value that is
            no number or cannot be a limit.
    """
    file = read_yaml(path)
    names = [figure.name for figure in FIGURES]
    file.check_keys(names)
    for name, value in file.data.items():
        problem = _problem(name, value)
        if problem:
            raise file.error((name,), problem)
    return {name: float(value) for name, value in file.data.items()}


def check_limits(limits: Mapping[str, Any]) -> dict[str, float]:
    """The limits as numbers.

    Raises:
        InputError: an unknown figure, or a value that cannot be a limit.
    """
    known = [figure.name for figure in FIGURES]
    for name, value in limits.items():
        if name not in known:
            raise InputError(f"limits: unknown figure {name!r}{nearest(name, known)}")
        problem = _problem(name, value)
        if problem:
            raise InputError(f"limits: {problem}")
    return {name: float(value) for name, value in limits.items()}


def _problem(name: str, value: Any) -> str | None:
    figure = next(f for f in FIGURES if f.name == name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name}: expected a number, found {value!r}"
    # Asked in this direction, so that NaN, which compares with nothing, is refused.
    if not 0 <= value <= figure.largest:
        top = f" to {figure.largest:g}" if figure.largest < math.inf else " or more"
        return f"{name}: expected 0{top}, found {value:g}"
    return None


def judge_limits(fidelity: Fidelity, limits: Mapping[str, float]) -> Fidelity:
    """The verdict under the user's limits, of which ``algebra`` and ``rounding`` were the tolerances already.

    A figure that has a limit and was not measured fails: nobody can say that it is kept.
    """
    fidelity = replace(fidelity, limits=dict(limits))
    broken = [
        outcome.sentence
        for outcome in outcomes(fidelity.to_json())
        if outcome.passed is False and (outcome.figure.default is None or outcome.found is None)
    ]
    return replace(fidelity, passed=fidelity.passed and not broken, reasons=[*fidelity.reasons, *broken])


def outcomes(fidelity: Mapping[str, Any]) -> Iterator[Outcome]:
    """Every figure against its limit, from :meth:`Fidelity.to_json`'s data."""
    limits = fidelity.get("limits") or {}
    for figure in FIGURES:
        value = fidelity.get(figure.name)
        found = None if value is None else float(value)  # "inf" and "nan" are strings in JSON
        limit = limits.get(figure.name)
        measured = found is not None
        if limit is None and figure.default is not None and measured:
            limit = float(fidelity[figure.default])
        yield Outcome(figure, found, limit, None if limit is None else measured and _keeps(figure, found, limit))


def _keeps(figure: Figure, found: float | None, limit: float) -> bool:
    if found is None:
        return False
    return found >= limit if figure.at_least else abs(found) <= limit
