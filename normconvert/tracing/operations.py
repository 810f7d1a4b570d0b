"""What operations are called, which of them are alike, and who reads a value.

An operation is known by its whole name (:func:`name_of`), and a kind of operations is a set of such names: a part of a
name says nothing, as ``view_as_complex`` is no view and ``embedding_bag`` no embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

OVERLOADS = {"aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.view.dtype"}
"""Overloads that mean something else than the operation they belong to: quotients that round, reinterpreted bits."""

ATTENTION = "aten.scaled_dot_product_attention"
SOFTMAX = {"aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.special_softmax"}
BATCH_NORMS = {
    *["aten.batch_norm", "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._batch_norm_impl_index"],
    *["aten._native_batch_norm_legit_functional", "aten._native_batch_norm_legit_no_training"],
    *["aten._batch_norm_no_update", "aten._batch_norm_with_update", "aten._batch_norm_with_update_functional"],
    *["aten.cudnn_batch_norm", "aten.miopen_batch_norm"],
}

EMBEDDING = "aten.embedding"
GETITEM = "<built-in function getitem>"
CONCATENATIONS = {"aten.cat", "aten.concat", "aten.concatenate"}
CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d"}
TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}

GROUPED = {"aten._grouped_mm", "transformers.grouped_mm_fallback"}
"""x W_e, row by row: the first rows of x by the first of several matrices, the next by the second, as offsets say."""

LINEAR_MAPS = {
    *["aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.einsum"],
    *CONVOLUTIONS,
    *TRANSPOSED,
    *GROUPED,
}
"""Operations with a weight that mixes channels: a leak through one of them is a linear map reading the raw stream."""

COPIES = {
    "normconvert.boundary",
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.contiguous",
    "aten.clone",
    "aten.float",
}
"""The same values on the same axes, perhaps in another dtype; none that training would miss, as it would a detach."""

ALIASES = {"aten.alias", "aten.detach", "aten.lift_fresh_copy"}
"""The same tensor once more."""

MOVES = {
    *["aten.permute", "aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.movedim", "aten.t", "aten.mT"],
    "aten.numpy_T",
}
"""The same values, the dimensions in another order."""

VIEWS = {
    *["aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze"],
    "aten.unsqueeze",
}
"""The same values in the same order, in other dimensions."""

STRETCHES = {"aten.expand", "aten.expand_as", "aten.broadcast_to"}

LIKE_ANOTHER = {"aten.type_as", "aten.expand_as", "aten.view_as", "aten.reshape_as"}
"""Operations that take the shape or the dtype of their second operand."""

SILENT = {"aten._assert_tensor_metadata"}
"""Assertions that look at a tensor's shape and dtype alone; others look at its values, and matter."""

NEUTRAL = {
    *SILENT,
    *["aten.sym_size", "aten.zeros_like", "aten.ones_like", "aten.empty_like"],
    *["aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty"],
}
"""Operations that look at a tensor's shape and dtype, never at its values."""

DROPOUTS = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout"}

SPLITS = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split"}
"""Operations that cut a value along one dimension; their result is a tuple of parts."""

PARTS = {
    *COPIES,
    *ALIASES,
    *MOVES,
    *VIEWS,
    *STRETCHES,
    *SPLITS,
    *["aten.select", "aten.slice", "aten.narrow", "aten.unbind", "aten.diagonal", GETITEM],
}
"""Operations that give a value, or a part of it, as it is."""

AVERAGES = {
    1: {"aten.adaptive_avg_pool1d", "aten.upsample_nearest1d", "aten.upsample_linear1d"},
    2: {
        *["aten.adaptive_avg_pool2d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d"],
        *["aten._upsample_bicubic2d_aa", "aten._upsample_bilinear2d_aa"],
    },
    3: {"aten.adaptive_avg_pool3d", "aten.upsample_trilinear3d"},
}
"""Last dimensions -> operations that average over neighbours along them, each channel for itself."""

KEEPS_CONSTANTS = {
    *(COPIES | ALIASES | MOVES | VIEWS | STRETCHES | LIKE_ANOTHER | CONCATENATIONS),
    *(DROPOUTS | SPLITS | AVERAGES[1] | AVERAGES[2] | AVERAGES[3]),
    *["aten.slice", "aten.select", "aten.unbind", GETITEM, "aten.repeat", "aten.tile", "aten.repeat_interleave"],
    *["aten.roll", "aten.flip", "aten.index_select", "aten.index", "aten.gather", "aten.mean", "aten.stack"],
}
"""Operations that make of values which are all c a value which is all c, whatever their arguments.

Padding, masks and sums are not among them; average pools are if they count no padding (`keeps_constants`).
"""

POOLS = {"aten.avg_pool1d": 1, "aten.avg_pool2d": 2, "aten.avg_pool3d": 3}
"""Averages that may count padding -> how many last dimensions they are over."""


def name_of(node: fx.Node) -> str:
    """The operation without its overload, e.g. ``aten.add``; the full name if that means something else.

    That is so for :data:`OVERLOADS`, and for those that write their result elsewhere.
    """
    return node.op if node.op != "call_function" else _name(node.target)


@functools.cache
def _name(target: Any) -> str:
    full = str(target)
    # A built-in function has no overload that could be dropped.
    name, _, overload = full.rpartition(".") if full.count(".") > 1 else (full, "", "")
    return full if full in OVERLOADS or "out" in overload.split("_") else name


def argument(node: Any, index: int, name: str, default: Any = None) -> Any:
    """An argument of the call, by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def readers(value: fx.Node, through: Collection[str] = ()) -> Iterator[fx.Node]:
    """Who reads a value; not who asks for its shape or dtype alone.

    Args:
        value: a node.
        through: operations whose readers are meant in their place, where the value is their first operand.
    """
    for user in filter(lambda user: reads(user, value), value.users):
        if name_of(user) in through and user.args[0] is value:
            yield from readers(user, through)
        else:
            yield user


def reads(user: fx.Node, value: fx.Node) -> bool:
    """Whether the operation, to which it is given, looks at a value, and not at its shape or dtype alone."""
    name = name_of(user)
    return not (name in NEUTRAL or (name in LIKE_ANOTHER and user.args[0] is not value))


def keeps_constants(node: fx.Node) -> bool:
    """Whether the operation makes of values which are all c a value which is all c."""
    name = name_of(node)
    if name not in POOLS:
        return name in KEEPS_CONSTANTS
    padding, counted = argument(node, 3, "padding", 0), argument(node, 5, "count_include_pad", True)
    # Zeros that are counted, or another divisor, make an average of a constant another number.
    divisor = None if name == "aten.avg_pool1d" else argument(node, 6, "divisor_override")
    return divisor is None and (all_are(padding, 0) or counted is False)


def all_are(value: Any, wanted: int) -> bool:
    """Whether a number, or each of several, is ``wanted``."""
    return all(v == wanted for v in (value if isinstance(value, (list, tuple)) else [value]))
