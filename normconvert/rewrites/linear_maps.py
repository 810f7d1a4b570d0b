"""The linear maps of a graph, and what an affine map may pass on the way to one: see `normconvert.rewrites.moving`."""

from __future__ import annotations

from torch import fx

from normconvert.analysis.channel_axes import shape_of
from normconvert.analysis.operations import CONVOLUTIONS, TRANSPOSED, all_are, argument, name_of
from normconvert.analysis.streams import operation

PRODUCTS = {"aten.linear", "aten.addmm", "aten.mm", "aten.matmul"}
LINEAR = CONVOLUTIONS | TRANSPOSED | PRODUCTS


class Blocked(Exception):
    """Why an affine map cannot move on; ``code`` is the class of the reason."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.code = code


class NoBias(Blocked):
    """A linear map could take the scale, and has no bias for the shift."""


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
