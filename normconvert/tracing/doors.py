"""Doors: the other ways into a model, each traced as a further call of the graph, so that one proof covers all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from normconvert.errors import TraceError
from normconvert.tracing.graph import Graph, merge, trace
from normconvert.tracing.probes import quiet
from normconvert.tracing.probes.entrances import Entrance, entrance_names, entrances


def with_entrances(model: nn.Module, graph: Graph, inputs: dict[str, Any]) -> Graph:
    """The graph with a call for each entrance that can be traced; the others are named in ``untraced_doors``.

    Args:
        model: on the meta device.
        graph: of a call with ``inputs``; taken over.
        inputs: keyword arguments of that call.
    """
    names = entrance_names(model, inputs)
    found: set[str] = set()
    with quiet():
        for alternatives in entrances(model, inputs) if names else ():
            if alternatives and found.issuperset(alternatives[0].names):
                continue
            for entrance in alternatives:
                try:
                    call = _entered(trace(model, entrance.inputs), entrance)
                except TraceError:
                    continue
                graph = merge(graph, call)
                found.update(entrance.names)
                break
    return replace(
        graph,
        doors=tuple(name for name in names if name in found),
        untraced_doors=tuple(name for name in names if name not in found),
    )


def _entered(graph: Graph, entrance: Entrance) -> Graph:
    """The graph of a call, with the placeholders noted that stand for what comes from outside."""
    nodes = [n for n in graph.nodes if n.op == "placeholder" and n not in graph.parameters]
    return replace(graph, outside=frozenset(n for n in nodes if n.name in entrance.names))
