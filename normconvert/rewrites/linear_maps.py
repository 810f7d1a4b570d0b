"""The linear maps of a graph, and what an affine map may pass on the way to one: see `normconvert.rewrites.moving`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, carry_back, shape_of
from normconvert.analysis.op_table import terms_of
from normconvert.analysis.streams import operation
from normconvert.plan.vectors import Expression
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import (
    CONVOLUTIONS,
    COPIES,
    MOVES,
    TRANSPOSED,
    VIEWS,
    all_are,
    argument,
    name_of,
    readers,
)

PRODUCTS = {"aten.linear", "aten.addmm", "aten.mm", "aten.matmul"}
LINEAR = CONVOLUTIONS | TRANSPOSED | PRODUCTS

MOVED = MOVES | COPIES | VIEWS
"""What may stand between a stored weight and the linear map that uses it."""


class Blocked(Exception):
    """Why an affine map cannot move on; ``code`` is the class of the reason."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Share:
    """One linear map's part of a move.

    Attributes:
        node: the linear map.
        weight: name of its weight.
        axis: dimension of the weight that holds the channels.
        outer: further factors of that dimension (see `ChannelAxis`), as ``inner``.
        start: to consumers, the first of its channels that is scaled.
        channels: to producers, which of the affine map's channels it takes: (start, stop).
        groups: as in `normconvert.plan.edits`, where dimension 1 continues dimension 0.
        bias: name of its bias; None if it has none.
        outputs: length of the bias.
        shifted: whether it takes the shift, too.
        calls: all nodes that read the weight or the bias.
        factor: to consumers, what norms on the way multiply the affine map's channels by.
    """

    node: fx.Node
    weight: str
    axis: int
    outer: int
    inner: int
    start: int
    channels: tuple[int, int]
    groups: int
    bias: str | None
    outputs: int
    shifted: bool
    calls: frozenset[fx.Node]
    factor: Expression = 1

    @property
    def recipe(self) -> tuple[Any, ...]:
        """All but the node: equal for two calls that ask the same of the weight."""
        return tuple(v for k, v in self.__dict__.items() if k != "node")


def weight_and_bias(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The operands of a linear map that hold its weight and, if it has one, its bias.

    Raises:
        Blocked: it scales its operands, or its weight is no tensor.
    """
    args = list(node.args)
    if name_of(node) == "aten.addmm":
        if node.kwargs:
            raise Blocked(f"{operation(node)} scales its operands", "unknown-op")
        bias, weight = args[0], args[2]
    else:
        weight = args[1]
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    if not isinstance(weight, fx.Node):
        raise Blocked(f"{operation(node)} has no weight", "unknown-op")
    return weight, bias if isinstance(bias, fx.Node) else None


def is_input(node: fx.Node, value: fx.Node) -> bool:
    """Whether ``value`` is what a linear map is applied to, and nothing else of it."""
    position = 1 if name_of(node) == "aten.addmm" else 0
    return node.args[position] is value and sum(a is value for a in node.all_input_nodes) == 1


def groups_of(node: fx.Node) -> int:
    """conv(input, weight, bias, stride, padding, dilation, groups); transposed: (..., output_padding, groups, ...)."""
    return int(argument(node, 6, "groups", 1))


def check_borders(node: fx.Node, weight: fx.Node) -> None:
    """A shift passes a convolution if every result sees the whole kernel: without zero padding.

    Results of a transposed convolution see different taps, unless it has one only.

    Raises:
        Blocked: they do not.
    """
    padding = argument(node, 4, "padding", 0)
    kernel = [int(n) for n in shape_of(weight)[2:]]
    if name_of(node) in CONVOLUTIONS:
        if padding != "valid" and not all_are(padding, 0):
            raise Blocked(f"{operation(node)} pads it with zeros, which a shift would have to be zero for", "padding")
        return
    # With a stride of two, every other result sees no tap at all.
    if not all(n == 1 for n in kernel) or not all_are(argument(node, 3, "stride", 1), 1):
        raise Blocked(f"{operation(node)} makes results of different taps, which a shift would tell apart", "padding")


def share_of(
    graph: Graph, node: fx.Node, value: fx.Node, axis: ChannelAxis, start: int, channels: tuple[int, int], shift: bool
) -> Share:
    """The part of a linear map whose results (``value`` is the node itself) or inputs (``value``) are scaled.

    Args:
        graph: the model's.
        node: the linear map.
        value: what is scaled.
        axis: where the value carries the channels.
        start: the first of its channels that is scaled.
        channels: which of the affine map's channels they are: (start, stop).
        shift: there is a shift, too.

    Raises:
        Blocked: the map cannot take it.
    """
    name, of_results = name_of(node), value is node
    weight, bias = weight_and_bias(node)
    convolves = name in CONVOLUTIONS | TRANSPOSED
    rank, weight_rank = len(shape_of(value)), len(shape_of(weight))
    # Without a batch, dimension 0 is a convolution's channels.
    dim = (1 if rank == weight_rank else 0) if convolves else rank - 1
    if axis.dim != dim or not (convolves or weight_rank == 2):
        where = f"it lies across the channels of {operation(node)}"
        raise Blocked(where if of_results else f"{operation(node)} reads it along other axes", "axes")
    if shift and convolves and not of_results:
        check_borders(node, weight)
    # Dimension 0 of a plain convolution's weight has the results of all groups, dimension 1 of a transposed one's
    # those of one group only, and the inputs of one group are all that any of them has.
    groups = groups_of(node) if convolves and not (of_results and name in CONVOLUTIONS) else 1
    # A group's channels are numbered from the group's first, which only a whole axis tells.
    if groups > 1 and (not axis.whole or channels[1] - channels[0] != axis.size):
        raise Blocked(f"{operation(node)} has groups", "cut")
    results_first = name in CONVOLUTIONS or name == "aten.linear"
    weight_name, weight_axis, readers = _parameter(graph, weight, 0 if results_first is of_results else 1, node)
    bias_name = None
    if bias is not None:
        bias_name, _, more = _parameter(graph, bias, 0, node)
        readers = readers | more
        if len(shape_of(bias)) != 1:
            raise Blocked(f"{operation(node)} has a bias that is no vector", "not-a-module")
    elif shift and not _can_gain_bias(graph, weight_name):
        raise Blocked(f"{operation(node)} has no bias to take the shift, and none can be added", "no-bias")
    return Share(
        node=node, weight=weight_name, axis=weight_axis, outer=int(axis.outer), inner=int(axis.inner), start=start,
        channels=channels, groups=groups, bias=bias_name, outputs=int(shape_of(node)[dim if convolves else -1]),
        shifted=shift, calls=readers,
    )  # fmt: skip


def _can_gain_bias(graph: Graph, weight: str) -> bool:
    """Whether the weight is a module's, built without a bias; that the module adds one is proved afterwards."""
    owner, _, leaf = weight.rpartition(".")
    module = graph.modules.get(owner)
    return module is not None and leaf == "weight" and "bias" in module._parameters and module.bias is None


def _parameter(graph: Graph, node: fx.Node, dim: int, reader: fx.Node) -> tuple[str, int, frozenset[fx.Node]]:
    """The stored parameter behind an operand: its name, the dimension that ``dim`` is there, all its readers."""
    axis = ChannelAxis(dim, int(shape_of(node)[dim]))
    while (parameter := graph.parameters.get(node)) is None:
        terms = terms_of(node)
        plain = terms is not None and len(terms) == 1 and len(terms[0]) == 1
        back = carry_back(terms[0][0], axis, node) if terms is not None and plain else None
        whole = isinstance(back, ChannelAxis) and back.whole and name_of(node) in MOVED
        if terms is None or not isinstance(back, ChannelAxis) or not whole:
            raise Blocked(f"the weight of {operation(reader)} is computed", "computed-weight")
        node, axis = terms[0][0].node, back
    # The plan names no aliases: an edit by one name would leave the tensor as it was under the others.
    if not parameter.stored or len(parameter.aliases) > 1:
        raise Blocked(f"the weight of {operation(reader)} is tied or not stored", "tied")
    return parameter.name, axis.dim, frozenset(readers(node, MOVED))
