"""What two graphs are compared by: numbers, constants, shapes and marks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from normconvert.analysis.channel_axes import ChannelAxis
from normconvert.rewrites.expected_changes import Epsilon
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import MARKER

SIZES: dict[str, int] = {
    **dict.fromkeys(["aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.split"], 1),
    **dict.fromkeys(["aten.split_with_sizes", "aten.broadcast_to", "aten.new_zeros", "aten.new_ones"], 1),
    **dict.fromkeys(["aten.new_full", "aten.new_empty"], 1),
    **dict.fromkeys(["aten.zeros", "aten.ones", "aten.full", "aten.empty"], 0),
    **dict.fromkeys(["aten.unflatten"], 2),
    "aten.slice": 3,
}
"""Operation -> the argument that holds sizes: in other widths it may differ as far as the shapes of the results may."""


CLAMP = ("aten.sub", "aten.maximum", "aten.minimum")
"""What the runtime's clamp does, in order, each with one of its tensors."""


def marks_by_key(graph: Graph) -> dict[Any, Iterator[fx.Node]]:
    """Module path, side and key -> the marks there, in order."""
    found: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is MARKER:
            found[tuple(node.args[1:4])].append(node)
    return {key: iter(nodes) for key, nodes in found.items()}


def floats_of(node: fx.Node) -> list[Any]:
    """The floating arguments of an operation."""
    return [value for value in (*node.args, *node.kwargs.values()) if type(value) is float]


def with_epsilon(value: Any, epsilon: Epsilon) -> Any:
    """An argument, or the new ε where it is the old one."""
    return epsilon.new if type(value) is float and value == epsilon.old else value


def same_number(a: Any, b: Any) -> bool:
    """Whether two arguments that are no values of a graph are the same, exactly; NaN equals nothing."""
    # 1 equals True in Python, and 0.0 equals -0.0: other arguments.
    if type(a) is not type(b) or a != b:
        return False
    return not isinstance(a, float) or math.copysign(1.0, a) == math.copysign(1.0, b)


def same_value(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two constants are the same, exactly; NaN equals nothing. None: it is no constant."""
    if a is None or b is None:
        return a is b
    same = a.dtype == b.dtype and torch.equal(a, b)
    return same and (not a.is_floating_point() or torch.equal(torch.signbit(a), torch.signbit(b)))


def tensors_of(node: fx.Node) -> list[Tensor]:
    """The tensors that an operation gives, without values."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def narrowed(shape: tuple[Any, ...], places: Collection[ChannelAxis]) -> tuple[Any, ...]:
    """The shape with one channel less at each place."""
    sizes = list(shape)
    for place in places:
        sizes[place.dim] = place.outer * (place.size - 1) * place.inner
    return tuple(sizes)
