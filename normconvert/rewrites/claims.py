"""Does the graph bear out what an rmsnorm plan claims of tensors: that what it centres may be, and what norms read is?

The values of tensors are in no graph, so the comparison of two graphs does not see which of them were edited. What a
plan says is therefore held against the analysis of the graph: each tensor is edited as its readers allow, each norm
that is replaced reads what these edits, and the operations that are inserted, leave without a mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.analysis.streams import Analysis, AxisRef, operation
from normconvert.options import OF_TENSORS, Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.centring import Centring, axis_of, editability
from normconvert.rewrites.fold import fold_norms
from normconvert.rewrites.registry import REWRITES, as_allowed
from normconvert.rewrites.verdicts import misuse
from normconvert.rewrites.writers import writer_edits
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import Boundary

CENTRED = "center"


def unfounded(graph: Graph, plan: Plan, options: Options) -> str:
    """The first edit of a plan that the graph does not bear out, or norm that reads a mean; empty if there is none.

    Args:
        graph: of the model.
        plan: with the names that the model has; of crmsnorm and fuse-bn nothing is claimed here.
        options: that allow edits.
    """
    if plan.method in OF_TENSORS:  # all that such a plan claims is what the graph asks of tensors
        return _other_edit(REWRITES[plan.method].planner(graph, options), plan)
    if plan.method != "rmsnorm":
        return ""
    analysis = Analysis(as_allowed(graph, options), find_norms(graph))
    found, boundaries = editability(analysis, options)
    calls = by_path(analysis.norms)
    inserted: set[Boundary] = set()
    for row in plan.modules:
        if row["op"] == CENTRED:
            key = (row["path"], row["side"], row["key"])
            if {axis_of(ref) for ref in boundaries.get(key, ())} != {row["axis"]}:
                return f"nothing may be centred at the {row['side']} of `{row['path']}`"
            inserted.add(key)
    paths = {row["path"] for row in plan.modules if row["op"] == "replace"}
    if missing := paths - calls.keys():
        return f"what `{min(missing)}` reads is not mean-free"
    replaced = [calls[path] for path in sorted(paths)]
    return _refused_edit(analysis, found, plan.tensors, replaced) or _norm_with_a_mean(
        analysis, found, boundaries, inserted, replaced, plan.tensors
    )


def _other_edit(own: Plan, plan: Plan) -> str:
    """The first tensor that a plan edits otherwise than the one that the graph asks for."""
    for name in dict.fromkeys([*plan.tensors, *own.tensors]):
        if plan.tensors.get(name) != own.tensors.get(name):
            return f"`{name}` is edited otherwise than those ask who read it and write with it"
    if plan.modules != own.modules:
        return "the norms have not the ε that the graph asks for"
    return "" if plan.config == own.config else "tied tensors are not those that the graph asks for"


def _refused_edit(
    analysis: Analysis, found: Centring, tensors: Mapping[str, list[dict[str, Any]]], replaced: list[list[Norm]]
) -> str:
    """The first tensor that was changed and must not be, or otherwise; or the first that was not and must be."""
    everything = {ref for stream in found.usable for ref in stream.members}
    allowed = writer_edits(analysis, found, everything, {"op": CENTRED})[0]
    # In the order of the planner, whose rows are compared as they stand.
    order = list(dict.fromkeys(norm.path for norm in analysis.norms))
    replaced = sorted(replaced, key=lambda calls: order.index(calls[0].path))
    folded = [calls for calls in replaced if any(row["op"] == "fill" for row in tensors.get(_own(calls), ()))]
    needed: dict[str, list[dict[str, Any]]] = {}
    fold_norms(analysis, folded, needed)
    for calls in folded:
        fold_norms(analysis, [calls], allowed)
    names = {alias: p.aliases for node, p in analysis.graph.parameters.items() if node.users for alias in p.aliases}
    for name, rows in tensors.items():
        if name not in names:
            return f"no traced input makes the model use `{name}`"
        asked = [allowed[alias] for alias in names.get(name, (name,)) if alias in allowed]
        if asked and rows not in asked:
            return f"`{name}` is edited otherwise than those ask who read it and write with it"
        if not asked:
            return f"`{name}` has readers that see its mean{_reader(found, analysis, name)}"
    left_out = next((n for n, rows in needed.items() if any(row not in tensors.get(n, ()) for row in rows)), None)
    return f"`{left_out}` reads a norm whose weight has moved, and does not take it" if left_out else ""


def _own(calls: list[Norm]) -> str:
    settings = calls[0].module or {}
    return f"{calls[0].path}.{settings.get('weight') or settings.get('bias')}"


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


def _norm_with_a_mean(
    analysis: Analysis,
    found: Centring,
    boundaries: Mapping[Boundary, list[AxisRef]],
    inserted: set[Boundary],
    replaced: list[list[Norm]],
    tensors: Mapping[str, list[dict[str, Any]]],
) -> str:
    """The first replaced norm whose input is not mean-free by these edits and operations."""
    parameters = analysis.graph.parameters

    def edited(ref: AxisRef, op: str = CENTRED) -> bool:
        return any(row["op"] == op for name in parameters[ref[0]].aliases for row in tensors.get(name, ()))

    clean = {ref for key in inserted for ref in boundaries[key]}
    for stream in found.usable:
        # In execution order the parts of a member come before it.
        for ref, made in stream.members.items():
            if made.kind == "parameter":
                fits = ref in found.editable | found.untied and edited(ref)
            elif made.kind == "scale":
                scale = found.scales.get(ref)
                fits = scale is not None and edited(scale.factor, "fill") and all(map(edited, scale.writers))
            else:
                fits = made.kind == "sum" and not made.rest and all(part in clean for part in made.parts)
                fits = fits or ref in found.given
            if fits:
                clean.add(ref)
    for calls in replaced:
        path = calls[0].path
        misused = misuse(path, calls, analysis.graph)
        if misused or any((norm.source, norm.place) not in clean for norm in calls):
            return f"what `{path}` reads is not mean-free"
    return ""
