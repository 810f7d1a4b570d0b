"""The op table: for each ATen operation, how a channel axis passes from its operands to its result.

Every rule describes its operation as a *sum of terms*, each term a *product of operands*, and tells for each operand
which of its dimensions arrive unchanged at which dimension of the result. ``linear(x, W, b)`` is ``x W + b``: the last
dimension of the result is dimension 0 of W and of b; the other dimensions are those of x. From this one description
follow both directions: what a channel of the result is made of, and where a channel of an operand goes. What is
not listed does not pass: an operation without a rule is never assumed harmless.
"""

from __future__ import annotations

from torch import fx

from normconvert.analysis import axis_rules as rules
from normconvert.analysis import moving_rules as moves
from normconvert.analysis.channel_axes import ChannelAxis, NoPlace, Operand, Term, carry_back, shape_of
from normconvert.tracing.operations import (
    ATTENTION,
    AVERAGES,
    CONCATENATIONS,
    CONVOLUTIONS,
    DROPOUTS,
    EMBEDDING,
    GETITEM,
    GROUPED,
    LIKE_ANOTHER,
    POOLS,
    SPLITS,
    STRETCHES,
    TRANSPOSED,
    VIEWS,
    name_of,
)

TABLE: dict[str, rules.AxisRule] = {
    # the same values
    **dict.fromkeys(
        [
            "normconvert.boundary",
            "aten.clone",
            "aten.contiguous",
            "aten.alias",
            "aten.detach",
            "aten.detach_",
            "aten.to",
        ]
        + ["aten._to_copy", "aten.type_as", "aten.lift_fresh_copy", "aten.neg", "aten.float", "aten.half"],
        rules.unary_rule,
    ),
    **dict.fromkeys(sorted(DROPOUTS), rules.dropout_rule),
    # sums and products
    **dict.fromkeys(["aten.add", "aten.sub", "aten.rsub"], rules.add_rule),
    "aten.mul": rules.mul_rule,
    "aten.div": rules.div_rule,
    **dict.fromkeys(["aten.div.Tensor_mode", "aten.div.Scalar_mode"], rules.div_rule),
    "aten.where": rules.where_rule,
    "aten.masked_fill": rules.masked_fill_rule,
    "aten.masked_scatter": rules.masked_scatter_rule,
    # views and moves
    "aten.permute": moves.permute_rule,
    **dict.fromkeys(["aten.transpose", "aten.t", "aten.swapaxes", "aten.swapdims", "aten.mT"], moves.swap_rule),
    "aten.numpy_T": moves.reverse_rule,
    "aten.movedim": moves.movedim_rule,
    **dict.fromkeys(sorted(VIEWS), moves.view_rule),
    **dict.fromkeys(sorted(STRETCHES), moves.expand_rule),
    "aten.slice": moves.slice_rule,
    **dict.fromkeys(sorted(SPLITS), moves.split_rule),
    **dict.fromkeys(["aten.unbind", "aten.select"], moves.unbind_rule),
    GETITEM: moves.getitem_rule,
    **dict.fromkeys(sorted(CONCATENATIONS), moves.cat_rule),
    "aten.stack": moves.stack_rule,
    **dict.fromkeys(["aten.pad", "aten.constant_pad_nd"], moves.pad_rule),
    **dict.fromkeys(["aten.repeat", "aten.tile"], moves.repeat_rule),
    # Called without a dimension it flattens first, as roll does: then none passes.
    "aten.repeat_interleave": rules.except_dim(2, "dim"),
    "aten.cumsum": rules.except_dim(1),
    "aten.roll": rules.except_dim(2, "dims"),
    "aten.flip": rules.except_dim(1, "dims"),
    "aten.index_select": rules.except_dim(1),
    "aten.index": moves.index_rule,
    "aten.index_put": moves.index_put_rule,
    "aten.gather": moves.gather_rule,
    # linear over other dimensions
    **dict.fromkeys(["aten.mean", "aten.sum"], rules.reduce_rule),
    **{name: rules.spatial(count) for name, count in POOLS.items()},
    **{name: rules.spatial(count) for count, names in AVERAGES.items() for name in sorted(names)},
    # linear maps
    "aten.linear": rules.linear_rule,
    **dict.fromkeys(["aten.matmul", "aten.mm", "aten.bmm"], rules.matmul_rule),
    **dict.fromkeys(["aten.addmm", "aten.baddbmm"], rules.addmm_rule),
    **dict.fromkeys(sorted(GROUPED), rules.grouped_rule),
    EMBEDDING: rules.embedding_rule,
    **dict.fromkeys(sorted(CONVOLUTIONS | TRANSPOSED), rules.conv_rule),
    ATTENTION: rules.attention_rule,
    "aten.einsum": rules.einsum_rule,
    # constants
    **dict.fromkeys(["aten.zeros", "aten.zeros_like", "aten.new_zeros"], rules.zeros_rule),
    **dict.fromkeys(["aten.full", "aten.full_like", "aten.new_full"], rules.full_rule),
}

POINTWISE = {
    *["aten.add", "aten.sub", "aten.rsub", "aten.mul", "aten.div", "aten.to", "aten._to_copy", "aten.clone"],
    *["aten.eq", "aten.ne", "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.logical_not", "aten.logical_and"],
    *["aten.logical_or", "aten.bitwise_not", "aten.bitwise_and", "aten.bitwise_or", "aten.__and__", "aten.__or__"],
    *["aten.sigmoid", "aten.exp", "aten.neg", "aten.contiguous", "aten.type_as", "aten.where", "aten.expand"],
    *["aten.expand_as", "aten.clamp", "aten.tanh", "normconvert.boundary", "aten.detach", "aten.pow", "aten.sqrt"],
    *["aten.rsqrt", "aten.reciprocal", "aten.abs", "aten.softplus"],
}
"""Element by element (after broadcasting): constant along an axis if every operand is."""

ACTIVATIONS = {
    *["aten.gelu", "aten.relu", "aten.relu6", "aten.silu", "aten.mish", "aten.elu", "aten.leaky_relu", "aten.prelu"],
    *["aten.hardswish", "aten.hardsigmoid", "aten.hardtanh"],
}
"""Element by element, and linear in nothing: a stream ends at them, a token stays the token that it was."""


REPEATS = {"aten.repeat", "aten.tile"}
"""The same along an axis that was one long, as if it had been stretched."""


def terms_of(node: fx.Node) -> tuple[Term, ...] | None:
    """The terms of ``node``; None if its operation has no rule, or not for this use."""
    if node.op != "call_function":
        return None
    rule = TABLE.get(name_of(node))
    return None if rule is None else rule(node)


def varies(node: fx.Node, place: ChannelAxis) -> bool:
    """Whether a value may differ along the channels at ``place``. True when in doubt."""
    shape = shape_of(node)
    if place.dim >= len(shape) or shape[place.dim] == 1:
        return False
    name = name_of(node)
    if name in POINTWISE | REPEATS:
        for arg in node.all_input_nodes if name not in LIKE_ANOTHER else node.all_input_nodes[:1]:
            source = carry_back(Operand(arg, rules.broadcast(arg, node)), place, node)
            if source is NoPlace.LOST or (isinstance(source, ChannelAxis) and varies(arg, source)):
                return True
        return False
    if TABLE.get(name) in (moves.view_rule, moves.permute_rule, moves.swap_rule):
        (((operand,),)) = TABLE[name](node)  # type: ignore[misc]
        source = carry_back(operand, place, node)
        return source is NoPlace.LOST or (isinstance(source, ChannelAxis) and varies(operand.node, source))
    return name not in ("aten.full", "aten.ones", "aten.zeros", "aten.new_ones", "aten.new_zeros", "aten.ones_like")


def carried(operand: Operand, place: ChannelAxis, result: fx.Node) -> ChannelAxis | None:
    """Where an operand carries channels of the result that differ; None if all of them see the same of it.

    What is the same along the channels is a number to them, however much it differs elsewhere.
    """
    source = carry_back(operand, place, result)
    return source if isinstance(source, ChannelAxis) and varies(operand.node, source) else None
