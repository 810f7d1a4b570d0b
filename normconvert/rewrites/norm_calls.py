"""The modules of a graph that are norms and nothing else, whatever their class makes of the formula; and its casts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.analysis.rms_by_hand import CASTS
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import MARKER
from normconvert.tracing.operations import name_of


@dataclass(frozen=True)
class NormCall:
    """A call of a module that is a norm: what the module is given, what it returns, and the norm."""

    source: Any
    result: Any
    norm: Norm


def norm_calls(graph: Graph, paths: Collection[str]) -> dict[str, Iterator[NormCall]]:
    """Module path -> its calls in order, of those modules that are norms and nothing else."""
    if not paths:
        return {}
    marks: dict[str, list[Any]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is MARKER and node.args[1] in paths and node.args[2:4] in (("input", "0"), ("output", "")):
            marks[str(node.args[1])].append(node.args[0])
    calls = by_path(find_norms(graph, uncentred=True))
    return {
        path: map(NormCall, values[::2], values[1::2], calls[path])
        for path, values in marks.items()
        if len(values) == 2 * len(calls[path]) and all(norm.module is not None for norm in calls[path])
    }


def is_cast(node: fx.Node) -> bool:
    """Whether it makes a floating dtype of another, and nothing else."""
    if name_of(node) not in CASTS or node.target is MARKER:
        return False
    before = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    after = node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    return before.is_floating_point() and after.is_floating_point() and before.shape == after.shape
