"""Does a conversion hold for another class of the model's family, which opens the same tensors under another head?

Only if the analysis of that class says so. A tensor may be changed there if all its readers are streams without leaks,
as in the class that was converted; and a norm may be replaced if what it reads is mean-free by the changes that were
made, not by those which that class itself would have taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from normconvert.analysis.norms import find_norms
from normconvert.analysis.streams import Analysis, AxisRef, operation
from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.centring import Centring, axis_of, editability
from normconvert.rewrites.fold import along
from normconvert.rewrites.registry import REWRITES
from normconvert.rewrites.verdicts import misuse
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import Boundary
from normconvert.tracing.model_graph import trace_model

CENTRED = "center"


def obstacle_in(
    model: nn.Module, plan: Plan, options: Options, tracer: Callable[[nn.Module], Graph] = trace_model
) -> str:
    """Why a plan does not hold for ``model``; empty if it is proved to hold.

    Args:
        model: on the meta device; another class than the one that the plan was made for.
        plan: with the names of the class that it was made for.
        options: that the plan was made with.
        tracer: how a model becomes a graph.
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
    if _same_edits(own, plan, edits, prefix, paths, tensors):
        return ""
    if plan.method != "rmsnorm":
        return "its own conversion would be another one"
    analysis = Analysis(graph, find_norms(graph))
    found, boundaries = editability(analysis, Options())
    why = _refused_edit(analysis, found, edits)
    if why:
        return why
    inserted: set[Boundary] = set()
    replaced: set[str] = set()
    for row in plan.modules:
        path = renamed(row["path"], prefix, paths)
        if row["op"] == CENTRED:
            key = (path or "", row["side"], row["key"])
            if path is None or key not in boundaries or {axis_of(ref) for ref in boundaries[key]} != {row["axis"]}:
                return f"nothing may be centred at the {row['side']} of `{row['path']}`"
            inserted.add(key)
        elif row["op"] == "replace" and path is not None:
            replaced.add(path)
    return _dirty_norm(analysis, found, boundaries, inserted, set(edits), replaced)


def renamed(name: str, prefix: str, known: Any) -> str | None:
    """A name in another class of the family: as it is, or without the base model's prefix, or with it."""
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)


def _same_edits(
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


def _refused_edit(analysis: Analysis, found: Centring, edits: Mapping[str, list[dict[str, Any]]]) -> str:
    """The first tensor that was changed and must not be, here; and how the others were changed is how they would be."""
    editable: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for ref in found.editable:
        for name in analysis.graph.parameters[ref[0]].aliases:
            editable[name].append({"op": CENTRED, **along(ref[1])})
    for name, rows in edits.items():
        # What else changes a tensor, a folded scale say, is proved for the one class only.
        if any(row["op"] != CENTRED for row in rows):
            return f"`{name}` was changed in more ways than by its mean"
        if name in analysis.graph.unreached:
            return f"no traced input makes the model use `{name}`"
        if any(row not in editable[name] for row in rows):
            return f"`{name}` has readers that see its mean{_reader(found, analysis, name)}"
    return ""


def _reader(found: Centring, analysis: Analysis, name: str) -> str:
    for ref, node in found.blocked.items():
        if name in analysis.graph.parameters[ref[0]].aliases:
            return f" ({operation(node)})"
    for stream in analysis.streams:
        for ref in stream.members:
            parameter = analysis.graph.parameters.get(ref[0])
            if parameter is not None and name in parameter.aliases and stream.leaks:
                return f": {stream.leaks[0].reason}"
    return ""


def _dirty_norm(
    analysis: Analysis,
    found: Centring,
    boundaries: Mapping[Boundary, list[AxisRef]],
    inserted: set[Boundary],
    edited: set[str],
    replaced: set[str],
) -> str:
    """The first replaced norm whose input is not mean-free by these edits and operations."""
    cleaned = {ref for key in inserted for ref in boundaries[key]}
    clean: set[AxisRef] = set()
    for stream in found.usable:
        # In execution order the parts of a member come before it.
        for ref, made in stream.members.items():
            if made.kind == "parameter":
                names = analysis.graph.parameters[ref[0]].aliases
                fits = ref in found.editable and not edited.isdisjoint(names)
            else:
                fits = made.kind == "sum" and not made.rest and all(part in clean for part in made.parts)
            if fits or ref in cleaned:
                clean.add(ref)
    groups = defaultdict(list)
    for norm in analysis.norms:
        groups[norm.path].append(norm)
    for path in sorted(replaced):
        calls = groups.get(path, [])
        refs = [(norm.source, norm.place) for norm in calls]
        if not calls or any(ref not in clean for ref in refs) or misuse(path, calls, analysis.graph):
            return f"what `{path}` reads is not mean-free"
    return ""
