"""Does a conversion hold for another class of the model's family, which opens the same tensors under another head?

Only if the analysis of that class says so. A tensor may be changed there if all its readers are streams without leaks,
as in the class that was converted; and a norm may be replaced if what it reads is mean-free by the changes that were
made, not by those which that class itself would have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.claims import unfounded
from normconvert.rewrites.inner_calls import runs_inside
from normconvert.rewrites.planning import difference
from normconvert.rewrites.registry import REWRITES
from normconvert.tracing.graph import Graph
from normconvert.tracing.model_graph import trace_model


def obstacle_in(
    model: nn.Module,
    plan: Plan,
    options: Options,
    tracer: Callable[[nn.Module], Graph] = trace_model,
    *,
    compare: bool = True,
    whole: Graph | None = None,
) -> str:
    """Why a plan does not hold for ``model``; empty if it is proved to hold.

    Args:
        model: on the meta device; another class than the one that the plan was made for.
        plan: with the names of the class that it was made for.
        options: that the plan was made with.
        tracer: how a model becomes a graph.
        compare: whether the edited class is traced and compared even where the analysis alone decides the plan.
        whole: of the class that the plan was made for, if it is compared: no part of it is compared again.
    """
    try:
        graph = tracer(model)
    except TraceError as error:
        return str(error)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    edits = {here: rows for name, rows in plan.tensors.items() if (here := renamed(name, prefix, tensors)) is not None}
    own = REWRITES[plan.method].planner(graph, options)
    stages = {"planning", "verification"} if compare else {"planning"}
    compared = REWRITES[plan.method].compared in stages and not (whole and runs_inside(graph, whole, prefix[:-1]))
    if same_edits(own, plan, edits, prefix, paths, tensors):
        return difference(graph, own, options) if compared and own.converted else ""
    if plan.method != "rmsnorm":
        return "its own conversion would be another one"
    modules = []
    for row in plan.modules:
        path = renamed(row["path"], prefix, paths)
        if path is None and row["op"] == "center":
            return f"nothing may be centred at the {row['side']} of `{row['path']}`"
        modules += [{**row, "path": path}] if path is not None else []
    for name, rows in edits.items():
        # What else changes a tensor, a folded scale say, is proved for the one class only.
        if any(row["op"] != "center" for row in rows):
            return f"`{name}` was changed in more ways than by its mean"
    there = replace(plan, tensors=edits, modules=modules)
    return (difference if compared else unfounded)(graph, there, Options())


def renamed(name: str, prefix: str, known: Any) -> str | None:
    """A name in another class of the family: as it is, or without the base model's prefix, or with it."""
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)


def same_edits(
    own: Plan, plan: Plan, edits: Mapping[str, list[dict[str, Any]]], prefix: str, paths: Any, tensors: Any
) -> bool:
    """Whether what this class would change itself is what was changed."""

    def here_too(value: Any) -> Any:
        if isinstance(value, list):
            return [here_too(one) for one in value]
        return (renamed(value, prefix, tensors) or value) if isinstance(value, str) else value

    edits = {name: [{k: here_too(v) for k, v in row.items()} for row in rows] for name, rows in edits.items()}
    rows = [{**row, "path": here} for row in plan.modules if (here := renamed(row["path"], prefix, paths)) is not None]
    return own.tensors == edits and sorted(map(str, own.modules)) == sorted(map(str, rows))
