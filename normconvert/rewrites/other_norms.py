"""The norms of a model that a conversion is not about: which, how many, why it leaves them, and what is for them.

A norm that nobody has a conversion for is known by what it does: a module called one that computes a statistic of its
own input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import fx

from normconvert.analysis.affine_norms import find_affine_norms
from normconvert.analysis.norms import find_norms
from normconvert.options import METHODS
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.operations import name_of

CALLS = {"aten.group_norm": "GroupNorm", "aten.instance_norm": "InstanceNorm"}
"""Operations that are norms over groups of channels or over positions -> what they are called without a module."""
STATISTICS = {"aten.mean", "aten.var", "aten.var_mean", "aten.std", "aten.std_mean", "aten.linalg_vector_norm"}
NAMED = re.compile(r"Norm(?![a-z])")
WHY = {
    "LayerNorm": "divides by a statistic of each token",
    "RMSNorm": "divides by a statistic of each token and subtracts no mean",
    "BatchNorm": "shifts and scales by numbers that were learnt",
    "": "divides by a statistic of each image or group of channels, which no weight can take",
}
"""Family -> what it does with its input, and so why a conversion that is for other norms leaves it."""


def other_norms(graph: Graph, method: str) -> list[str]:
    """A sentence for each kind of norm that ``method`` is not about."""
    families: Counter[tuple[str, str]] = Counter()
    for family, kind in _norms(graph):
        if family not in _families(METHODS[method]):
            families[family, kind] += 1
    return [_sentence(family, kind, count) for (family, kind), count in families.items()]


def _sentence(family: str, kind: str, count: int) -> str:
    meant = [name for name, norms in METHODS.items() if family and family in _families(norms)]
    then = f"see {', '.join(meant)}" if meant else "no conversion is for it"
    return f"{count} {kind}: {WHY[family]}; {then}"


def _families(norms: str) -> list[str]:
    return re.split(r"\W+", norms)


def _norms(graph: Graph) -> Iterator[tuple[str, str]]:
    """Family and kind of every norm of the graph, one for each module."""
    seen = set()
    for norm in find_norms(graph, uncentred=True):
        if norm.path not in seen:
            yield "LayerNorm" if norm.centred else "RMSNorm", norm.kind
        seen.add(norm.path)
    for affine in find_affine_norms(graph):
        if affine.path not in seen:
            yield "BatchNorm", affine.kind
        seen.add(affine.path)
    for node in graph.nodes:
        path = module_path(node)
        if _is_norm(graph, node, path) and not any(path == p or path.startswith(f"{p}.") for p in seen):
            seen.add(path)
            yield "", type(graph.modules[path]).__name__ if NAMED.search(_kind(graph, path)) else CALLS[name_of(node)]


def _is_norm(graph: Graph, node: fx.Node, path: str) -> bool:
    name = name_of(node)
    return name in CALLS or (name in STATISTICS and NAMED.search(_kind(graph, path)) is not None)


def _kind(graph: Graph, path: str) -> str:
    return type(graph.modules[path]).__name__ if path in graph.modules else ""
