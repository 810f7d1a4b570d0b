"""The figures of a verification that a record states: could they have appeared, and does the checkpoint have them?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from normconvert.plan.conversion_record import RECORD_FILE
from normconvert.verification.folder_comparison import Finding

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan
    from normconvert.verification.fidelity import Fidelity

APART: dict[str, tuple[float, float]] = {
    "algebra": (1e-12, 1.0),
    "rounding": (0.1, 0.5),
    "top1": (0.02, 0.0),
    "kl": (1e-6, 1.0),
    "loss_difference": (1e-3, 0.5),
    "mean_over_rms": (1e-4, 1.0),
    "storage": (0.01, 0.0),
}
"""Figure -> how far two machines may be apart: a number, and a share of the smaller. One machine repeats all bits."""


def implausible(found: Fidelity | None, plan: Plan) -> Iterator[Finding]:
    """Recorded figures of which this or any other conversion could not have appeared."""
    from normconvert.verification.equivalence import tolerance_for
    from normconvert.verification.rounding import ROUNDING_TOLERANCE

    if found is None:
        return
    largest = {"tolerance": tolerance_for(plan), "rounding_tolerance": ROUNDING_TOLERANCE}
    for name, most in largest.items():
        if not 0 <= getattr(found, name) <= most:
            yield _finding(name, f"is {getattr(found, name)}, at most {most}")
    figures = {"algebra": (found.algebra, found.tolerance), "rounding": (found.rounding, found.rounding_tolerance)}
    for name, (value, most) in figures.items():
        if value is not None and not 0 <= value <= most:
            yield _finding(name, f"is {value}: such a result does not appear")
    if not found.passed or found.reasons:
        yield _finding("passed", "is false: such a result does not appear")


def other_figures(measured: Fidelity, recorded: Fidelity) -> tuple[list[Finding], list[str]]:
    """What is recorded otherwise than it is measured: findings, and figures that another machine may have given."""
    findings: list[Finding] = []
    near: list[str] = []
    for name, (most, share) in APART.items():
        old, new = getattr(recorded, name), getattr(measured, name)
        if old == new:
            continue
        if old is None or new is None or not abs(old - new) <= most + share * min(abs(old), abs(new)):
            findings.append(_finding(name, f"is {old}, measured {new}"))
        else:
            near.append(f"{name} {new}, recorded {old}")
    if not measured.passed:
        findings.append(_finding("passed", f"is true, but measured again: {'; '.join(measured.reasons)}"))
    there, here = recorded.to_json(), measured.to_json()
    near += [f"rows of {name}" for name in ("moved", "probes") if there[name] != here[name]]
    return findings, near


def _finding(name: str, what: str) -> Finding:
    return Finding("record", f"verification.{name}", RECORD_FILE, what)
