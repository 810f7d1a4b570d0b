"""The conversions: what plans each, and where its edited model is compared with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.tracing.graph import Graph

Planner = Callable[[Graph, Options], Plan]
"""The traced model and what the user allows -> tensor edits, module edits, a verdict for every norm."""
Stage = Literal["planner", "planning", "verification"]


@dataclass(frozen=True)
class Rewrite:
    """A conversion.

    Attributes:
        planner: makes its plan.
        compared: who has the edited model traced and compared: the planner itself, draft by draft; the planning, so
            that a plan which does not hold is none; or the verification, where the analysis alone decides the plan.
    """

    planner: Planner
    compared: Stage


REWRITES: dict[str, Rewrite] = {}
"""Name of a conversion, as the user gives it -> the conversion."""


def rewrite(method: str, *, compared: Stage) -> Callable[[Planner], Planner]:
    """Register what makes the plan of the conversion ``method``.

    Args:
        method: its name; what the user reads of it stands in :data:`normconvert.options.METHODS`.
        compared: see :class:`Rewrite`.
    """

    def register(planner: Planner) -> Planner:
        REWRITES[method] = Rewrite(lambda graph, options: planner(as_allowed(graph, options), options), compared)
        return planner

    return register


def as_allowed(graph: Graph, options: Options) -> Graph:
    """The graph that a plan is made for: where what no call reads is taken for unused, that is known of it."""
    return replace(graph, unread_is_unused=True) if options.allow_unread else graph
