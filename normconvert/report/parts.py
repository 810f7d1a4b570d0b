"""Parts that sections of the HTML report share."""

from __future__ import annotations

from typing import Any

from normconvert.plan.conversion_plan import Plan
from normconvert.report.blocks import NormLine, model_blocks, norm_lines
from normconvert.wording.words import becomes


def badge(passed: bool | None, otherwise: str) -> tuple[str, str]:
    """(state, words) of the badge beside a heading."""
    return {None: ("plain", otherwise), True: ("good", "passed"), False: ("bad", "failed")}[passed]


def tile(label: str, value: str, below: str = "", state: str = "") -> dict[str, str]:
    """A figure at the top of a section."""
    return {"label": label, "value": value, "below": below, "state": state}


def plan_view(plan: Plan, architecture: str) -> dict[str, Any]:
    """The model as a column of blocks, and every reason in full below it."""
    return {
        "model": model_blocks(architecture, plan),
        "kept": by_reason(plan, converted=False),
        "converted": by_reason(plan, converted=True),
        "counts": (len(plan.converted), len(plan.verdicts)),
        "becomes": becomes(plan.method),
    }


def by_reason(plan: Plan, *, converted: bool) -> list[tuple[str, list[NormLine]]]:
    """(reason, the norms that it holds for), in the order of execution."""
    reasons: dict[str, list[NormLine]] = {}
    for line in norm_lines(plan.verdicts):
        if line.converted is converted:
            reasons.setdefault(line.reason, []).append(line)
    return list(reasons.items())


def bars(seconds: dict[str, float]) -> list[tuple[str, str, int]]:
    """(stage, its time, its share in percent of the longest)."""
    # Stages that took no time at all have no longest one to be divided by.
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(stage, f"{s:.2f} s", max(1, round(100 * s / longest))) for stage, s in seconds.items()]
