"""The linear maps of a graph, and what an affine map may pass on the way to one: see `normconvert.rewrites.moving`."""

from __future__ import annotations

from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import shape_of
from normconvert.analysis.norms import COPIES, MOVES
from normconvert.analysis.op_table import name_of, terms_of
from normconvert.analysis.streams import operation

CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d"}
TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}
PRODUCTS = {"aten.linear", "aten.addmm", "aten.mm", "aten.matmul"}
LINEAR = CONVOLUTIONS | TRANSPOSED | PRODUCTS

CONSTANT_KEPT = {
    *COPIES,
    *MOVES,
    *["aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze"],
    *["aten.unsqueeze", "aten.t", "aten.mT", "aten.numpy_T", "aten.swapdims", "aten.expand", "aten.expand_as"],
    *["aten.reshape_as", "aten.view_as", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.broadcast_to"],
    *["aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.slice", "aten.select", "aten.unbind"],
    *["aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split", "<built-in function getitem>"],
    *["aten.repeat", "aten.tile", "aten.repeat_interleave", "aten.roll", "aten.flip", "aten.index_select"],
    *["aten.index", "aten.mean", "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d"],
    *["aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_linear1d", "aten.upsample_bilinear2d"],
    *["aten.upsample_bicubic2d", "aten._upsample_bicubic2d_aa", "aten._upsample_bilinear2d_aa"],
    *["aten.upsample_trilinear3d"],
}
"""Operations that map values which are all c to values which are all c."""

POOLS = {"aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d"}


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


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument by its position or its name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def groups_of(node: fx.Node) -> int:
    """conv(input, weight, bias, stride, padding, dilation, groups); transposed: (..., output_padding, groups, ...)."""
    return int(argument(node, 6, "groups", 1))


def _all(value: Any, wanted: int) -> bool:
    return all(v == wanted for v in (value if isinstance(value, (list, tuple)) else [value]))


def check_borders(node: fx.Node, weight: fx.Node) -> None:
    """A shift passes a convolution if every result sees the whole kernel: without zero padding.

    Results of a transposed convolution see different taps, unless it has one only.

    Raises:
        Blocked: they do not.
    """
    padding = argument(node, 4, "padding", 0)
    kernel = [int(n) for n in shape_of(weight)[2:]]
    if name_of(node) in CONVOLUTIONS:
        if padding != "valid" and not (isinstance(padding, (int, list, tuple)) and _all(padding, 0)):
            raise Blocked(f"{operation(node)} pads it with zeros, which a shift would have to be zero for", "padding")
        return
    # With a stride of two, every other result sees no tap at all.
    if not all(n == 1 for n in kernel) or not _all(argument(node, 3, "stride", 1), 1):
        raise Blocked(f"{operation(node)} makes results of different taps, which a shift would tell apart", "padding")


def keeps_constants(node: fx.Node) -> bool:
    """Whether the operation maps a constant to the same constant."""
    name = name_of(node)
    if name in POOLS:
        padding = argument(node, 3, "padding", 0)
        counted = argument(node, 5, "count_include_pad", True)
        # Zeros that are counted, or another divisor, make an average of a constant another number.
        divisor = None if name == "aten.avg_pool1d" else argument(node, 6, "divisor_override", None)
        return divisor is None and (_all(padding, 0) or counted is False)
    if name == "aten.add" or name not in CONSTANT_KEPT:
        return False
    return not any(o.node for t in terms_of(node) or () for o in t[1:] if o.linear)
