"""The conversions: what plans each, and what proves it beyond the analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.tracing.graph import Graph

Planner = Callable[[Graph, Options], Plan]
"""The traced model and what the user allows -> tensor edits, module edits, a verdict for every norm."""
Proof = Callable[[Graph, Graph, Plan], str]
"""(original's graph, edited model's graph, plan) -> the first difference that is not meant; empty if there is none."""


@dataclass(frozen=True)
class Rewrite:
    """A conversion.

    Attributes:
        planner: makes its plan.
        proof: compares the edited model, traced again, with the original; None where the analysis alone is the proof.
    """

    planner: Planner
    proof: Proof | None = None


REWRITES: dict[str, Rewrite] = {}
"""Name of a conversion, as the user gives it -> the conversion."""


def rewrite(method: str, *, proof: Proof | None = None) -> Callable[[Planner], Planner]:
    """Register what makes the plan of the conversion ``method``.

    Args:
        method: its name; what the user reads of it stands in :data:`normconvert.options.METHODS`.
        proof: see :class:`Rewrite`.
    """

    def register(planner: Planner) -> Planner:
        REWRITES[method] = Rewrite(planner, proof)
        return planner

    return register
