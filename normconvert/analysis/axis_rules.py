"""One function an operation: the terms of a node, or None where this use of the operation is not understood.

A rule says which dimensions of each operand arrive unchanged at which dimension of the result. What is not listed does
not pass. Here are arithmetic, linear maps and attention; what only moves values is in
`normconvert.analysis.moving_rules`. `normconvert.analysis.op_table` lists which operation has which rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normconvert.analysis.channel_axes import Operand, Term, is_float, shape_of
from normconvert.tracing.operations import COPIES, STRETCHES, TRANSPOSED, argument, name_of


def kept_dims(node: Call, but: Sequence[int] = ()) -> dict[int, int]:
    """All dimensions stay where they are, except ``but`` (may be negative)."""
    rank = len(shape_of(node))
    skip = {d % rank for d in but} if rank else set()
    return {d: d for d in range(rank) if d not in skip}


def broadcast(arg: Call, result: fx.Node) -> dict[int, int]:
    """Dimensions aligned at the right; a dimension of one that is stretched does not pass."""
    old, new = shape_of(arg), shape_of(result)
    shift = len(new) - len(old)
    return {d: d + shift for d in range(len(old)) if d + shift >= 0 and old[d] == new[d + shift]}


def dims_argument(value: Any, rank: int) -> list[int]:
    """The dimensions that an argument names, counted from the front."""
    values = [value] if isinstance(value, int) else list(value) if value else list(range(rank))  # none named: all
    return [v % rank for v in values] if rank else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or (
        isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), Tensor)
    )


Call = Any
"""A node of the graph; its arguments have no types."""

AxisRule = Callable[[fx.Node], "tuple[Term, ...] | None"]


def unary_rule(node: Call) -> tuple[Term, ...] | None:
    """The same values on the same axes: casts between floating dtypes, copies, boundary markers, negation."""
    x = node.args[0]
    # A cast to integers rounds, one to truth values compares: neither is linear.
    if not (is_float(x) and is_float(node)):
        return None
    return ((Operand(x, kept_dims(x)),),)


def dropout_rule(node: Call) -> tuple[Term, ...] | None:
    """Nothing happens in eval mode."""
    return None if argument(node, 2, "train", True) else unary_rule(node)


def add_rule(node: Call) -> tuple[Term, ...]:
    """a + b, a - b; a number is a term that is the same for all channels."""
    # A sign or alpha of the second operand leaves it linear. Zero is left out, or as a constant it would taint the sum.
    return tuple((Operand(a, broadcast(a, node)),) if not _is_number(a) else () for a in node.args[:2] if a != 0)


def mul_rule(node: Call) -> tuple[Term, ...]:
    """a * b: a product, whatever carries the channels."""
    return (tuple(Operand(a, broadcast(a, node)) for a in node.args[:2] if not _is_number(a)),)


def div_rule(node: Call) -> tuple[Term, ...] | None:
    """a / b: linear in a."""
    top, bottom = node.args[:2]
    # One over a value is not linear in it, and a rounded quotient in nothing.
    if _is_number(top) or node.kwargs.get("rounding_mode"):
        return None
    gate = () if _is_number(bottom) else (Operand(bottom, broadcast(bottom, node), linear=False),)
    return ((Operand(top, broadcast(top, node)), *gate),)


def where_rule(node: Call) -> tuple[Term, ...] | None:
    """Chosen by a mask."""
    # With a condition alone it returns positions.
    if len(node.args) != 3:
        return None
    gate = Operand(node.args[0], broadcast(node.args[0], node), linear=False)
    return tuple(
        (Operand(a, broadcast(a, node)), gate) if not _is_number(a) else (gate,) for a in node.args[1:3] if a != 0
    )


def masked_fill_rule(node: Call) -> tuple[Term, ...]:
    """Replaced by a number where the mask says so."""
    x, mask, value = node.args[:3]
    gate = Operand(mask, broadcast(mask, node), linear=False)
    # Zero is in every stream. Another number is a constant, if only for the tokens that the mask picks.
    fill: tuple[Term, ...] = () if value == 0 else ((gate,),)
    return ((Operand(x, broadcast(x, node)), gate), *fill)


def masked_scatter_rule(node: Call) -> tuple[Term, ...]:
    """Rows of ``source`` replace the rows of x that the mask selects; the mask must be the same along the channels."""
    x, mask, source = node.args[:3]
    last, rank = len(shape_of(source)) - 1, len(shape_of(node))
    gate = Operand(mask, broadcast(mask, node), linear=False)
    # Source is used up number by number: a mask that differs along a row would shift the channels of all that follow.
    dims = {last: rank - 1} if _one_for_all(mask) else {}
    return (Operand(x, kept_dims(x)), gate), (Operand(source, dims), gate)


def _one_for_all(mask: Call) -> bool:
    """Whether a mask is the same along its whole last dimension: one value, or one value stretched."""
    while shape_of(mask)[-1] != 1:
        if name_of(mask) not in COPIES | STRETCHES:
            return False
        mask = mask.args[0]
    return True


def except_dim(position: int, name: str = "dim") -> AxisRule:
    """All dimensions pass except the one named by an argument (slice, roll, index_select, ...)."""

    def rule(node: Call) -> tuple[Term, ...]:
        x = node.args[0]
        rank = len(shape_of(x))
        dims = dims_argument(argument(node, position, name), rank)
        return ((Operand(x, kept_dims(x, dims)),),)

    return rule


def reduce_rule(node: Call) -> tuple[Term, ...]:
    """mean and sum over other dimensions."""
    x = node.args[0]
    rank = len(shape_of(x))
    gone = set(dims_argument(argument(node, 1, "dim"), rank))
    keep = bool(argument(node, 2, "keepdim", False))
    left = [d for d in range(rank) if d not in gone]
    return ((Operand(x, {d: d if keep else left.index(d) for d in left}),),)


def spatial(count: int) -> AxisRule:
    """Linear in each channel on its own, over ``count`` trailing dimensions: average pooling, interpolation."""

    def rule(node: Call) -> tuple[Term, ...]:
        x = node.args[0]
        return ((Operand(x, kept_dims(x, range(-count, 0))),),)

    return rule


def linear_rule(node: Call) -> tuple[Term, ...] | None:
    """x W + b: the last dimension of the result is dimension 0 of W and b. A vector for W has no rule."""
    x, weight = node.args[0], node.args[1]
    bias = argument(node, 2, "bias")
    # A vector's only dimension is summed over, so dimension 0 is none of the result's.
    if len(shape_of(weight)) == 1:
        return None
    last = len(shape_of(node)) - 1
    terms: list[Term] = [(Operand(x, kept_dims(x, [-1])), Operand(weight, {0: last}))]
    if bias is not None:
        terms.append((Operand(bias, {0: last}),))
    return tuple(terms)


def _matmul_term(a: Call, b: Call, node: Call) -> Term | None:
    rank_a, rank_b, rank = len(shape_of(a)), len(shape_of(b)), len(shape_of(node))
    if rank_a == 1 and rank_b == 1:
        return None
    if rank_b == 1:
        return (Operand(a, kept_dims(a, [-1])), Operand(b, {}))
    if rank_a == 1:
        return (Operand(a, {}), Operand(b, {d: d - (d == rank_b - 1) for d in range(rank_b) if d != rank_b - 2}))
    new = shape_of(node)
    dims_a = {d: d + rank - rank_a for d in range(rank_a - 1)}
    dims_b = {d: d + rank - rank_b for d in range(rank_b) if d != rank_b - 2}
    # A batch dimension of one that is stretched is the same for all of the result.
    dims_a = {s: t for s, t in dims_a.items() if shape_of(a)[s] == new[t]}
    dims_b = {s: t for s, t in dims_b.items() if shape_of(b)[s] == new[t]}
    return (Operand(a, dims_a), Operand(b, dims_b))


def matmul_rule(node: Call) -> tuple[Term, ...] | None:
    """(A B): rows from A, columns from B."""
    term = _matmul_term(node.args[0], node.args[1], node)
    return None if term is None else (term,)


def addmm_rule(node: Call) -> tuple[Term, ...] | None:
    """c + A B (also baddbmm, addbmm is not the same and has no rule)."""
    term = _matmul_term(node.args[1], node.args[2], node)
    return None if term is None else ((Operand(node.args[0], broadcast(node.args[0], node)),), term)


def grouped_rule(node: Call) -> tuple[Term, ...] | None:
    """Rows of x by several matrices (k, n), the offsets saying which rows by which: n is the columns'."""
    x, weight, offsets = node.args[0], node.args[1], argument(node, 2, "offs")
    # Of two or of three dimensions both, it groups other things; a bias of it means nothing yet.
    if len(shape_of(x)) != 2 or len(shape_of(weight)) != 3 or argument(node, 3, "bias") is not None:
        return None
    # The rows of x do not pass: each is multiplied by what its place among them chooses.
    return ((Operand(x, {}), Operand(weight, {2: 1}), Operand(offsets, {}, linear=False)),)


def embedding_rule(node: Call) -> tuple[Term, ...]:
    """The last dimension is dimension 1 of the table."""
    weight, index = node.args[0], node.args[1]
    rank = len(shape_of(node))
    return ((Operand(weight, {1: rank - 1}), Operand(index, kept_dims(index), linear=False)),)


def conv_rule(node: Call) -> tuple[Term, ...] | None:
    """W * x + b. With groups each output channel sees other inputs, so no map across channels moves into W: no rule."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if argument(node, 6, "groups", 1) != 1:
        return None
    batched = len(shape_of(x)) == len(shape_of(weight))
    channel = 1 if batched else 0
    # The weight of a transposed convolution is (inputs, outputs, ...).
    source = 1 if name_of(node) in TRANSPOSED else 0
    # The kernel mixes the places of x, so nothing but its batch dimension passes.
    terms: list[Term] = [(Operand(x, {0: 0} if batched else {}), Operand(weight, {source: channel}))]
    if bias is not None:
        terms.append((Operand(bias, {0: channel}),))
    return tuple(terms)


def attention_rule(node: Call) -> tuple[Term, ...]:
    """softmax(q k') v: mixes tokens of v, and passes its last dimension."""
    q, k, v = node.args[:3]
    rank = len(shape_of(node))
    mask = argument(node, 3, "attn_mask")
    others = (q, k) if mask is None else (q, k, mask)
    # Heads of q, k and the mask go with those of v; their last two dimensions are used up by the softmax.
    gates = tuple(
        Operand(g, {s: t for s, t in broadcast(g, node).items() if t < rank - 2}, linear=False) for g in others
    )
    return ((Operand(v, {**{d: d for d in range(rank - 2)}, rank - 1: rank - 1}), *gates),)


def einsum_rule(node: Call) -> tuple[Term, ...] | None:
    """Each letter of the result passes from the operands that have it."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    term = []
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        # A letter twice in one operand takes its diagonal, for which there is no place.
        if len(set(letters)) != len(letters):
            return None
        term.append(Operand(operand, {d: output.index(c) for d, c in enumerate(letters) if c in output}))
    return (tuple(term),)


def zeros_rule(node: Call) -> tuple[Term, ...]:
    """No term at all: zero is in every stream."""
    return ()


def full_rule(node: Call) -> tuple[Term, ...]:
    """A number everywhere: nothing, or a constant."""
    # new_full has its size here, which is never 0: it counts as a constant, which may cost a norm and is always right.
    return () if node.args[1] == 0 else ((),)
