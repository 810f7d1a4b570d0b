"""The op table: for each ATen operation, how a channel axis passes from its operands to its result.

A value carries the channels of a stream on one factor of one dimension: dimension ``dim`` has
``outer * size * inner`` elements and the middle factor is the channel (`Place`). So a channel axis that a view merges into
``batch * channels * height`` and splits again later is still the same axis.

Every row describes its operation as a *sum of terms*, each term a *product of operands*, and tells for each operand which
of its dimensions arrive unchanged at which dimension of the result. ``linear(x, W, b)`` is ``x W + b``: the last
dimension of the result is dimension 0 of W and of b; the other dimensions are those of x. From this one description
follow both directions: what a channel of the result is made of, and where a channel of an operand goes. What is
not listed does not pass: an operation without a row is never assumed harmless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

Dims = Mapping[int, int]
"""Dimension of an operand -> dimension of the result where it arrives unchanged."""


@dataclass(frozen=True)
class Place:
    """Where a value carries the channels: dimension ``dim`` is ``outer * size * inner``, the channel in the middle."""

    dim: int
    size: int
    outer: Any = 1
    inner: Any = 1

    @property
    def whole(self) -> bool:
        """Whether the channels are the whole dimension."""
        return bool(self.outer == 1 and self.inner == 1)


@dataclass(frozen=True)
class Operand:
    """One operand of a term.

    Attributes:
        node: the value.
        dims: which of its dimensions arrive where.
        linear: whether the result is linear in it; False for masks, indices, divisors and the like, which a channel
            may not depend on.
        view: the operand is reshaped: row-major order is kept, dimensions are not; ``dims`` is not used.
        regroup: dimensions that are cut or joined in whole blocks (split, cat): ``outer`` may change there.
    """

    node: fx.Node
    dims: Dims
    linear: bool = True
    view: bool = False
    regroup: int | None = None


Term = tuple[Operand, ...]
"""A product of operands; an empty product is a constant, the same for all channels."""


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape of a value; symbolic sizes as sympy expressions. For a tuple of tensors, that of the first."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = next((v for v in value if isinstance(v, Tensor)), None)
    if not isinstance(value, Tensor):
        return ()
    return tuple(s if isinstance(s, int) else s.node.expr for s in value.shape)


def is_float(node: fx.Node) -> bool:
    """Whether the value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _product(sizes: Sequence[Any]) -> Any:
    return math.prod(sizes)


def _quotient(a: Any, b: Any) -> Any | None:
    """a / b if it is whole, else None (also for symbolic sizes)."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = a / b
    numerator, denominator = ratio.as_numer_denom()
    return numerator if denominator == 1 else None


def reshaped(place: Place, old: Sequence[Any], new: Sequence[Any]) -> Place | None:
    """The place after a row-major reshape, or None if the channel axis is cut."""
    before = _product(old[: place.dim]) * place.outer
    after = place.inner * _product(old[place.dim + 1 :])
    for dim in range(len(new)):
        outer = _quotient(before, _product(new[:dim]))
        inner = _quotient(after, _product(new[dim + 1 :]))
        if outer is not None and inner is not None and outer * place.size * inner == new[dim]:
            return Place(dim, place.size, outer, inner)
    return None


def carry_forward(operand: Operand, place: Place, result: fx.Node) -> Place | None:
    """Where the channels of ``operand`` at ``place`` are in ``result``; None if they do not arrive."""
    old, new = shape_of(operand.node), shape_of(result)
    if operand.view:
        return reshaped(place, old, new)
    if operand.regroup is not None and place.dim == operand.regroup:
        return _regrouped(place, new[operand.regroup])
    target = operand.dims.get(place.dim)
    return None if target is None else replace(place, dim=target)


def carry_back(operand: Operand, place: Place, result: fx.Node) -> Place | None:
    """Where ``operand`` carries the channels that ``result`` has at ``place``; None if it is constant along them."""
    old, new = shape_of(operand.node), shape_of(result)
    if operand.view:
        return reshaped(place, new, old)
    if operand.regroup is not None and place.dim == operand.regroup:
        return _regrouped(place, old[operand.regroup])
    for source, target in operand.dims.items():
        if target == place.dim:
            return replace(place, dim=source) if old[source] == new[target] else None
    return None


def _regrouped(place: Place, size: Any) -> Place | None:
    outer = _quotient(size, place.size * place.inner)
    return None if outer is None else replace(place, outer=outer)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers that say where dimensions go


def _same(node: fx.Node, but: Sequence[int] = ()) -> dict[int, int]:
    """All dimensions stay where they are, except ``but`` (may be negative)."""
    rank = len(shape_of(node))
    skip = {d % rank for d in but} if rank else set()
    return {d: d for d in range(rank) if d not in skip}


def _broadcast(arg: fx.Node, result: fx.Node) -> dict[int, int]:
    """Dimensions aligned at the right; a dimension of one that is stretched does not pass."""
    old, new = shape_of(arg), shape_of(result)
    shift = len(new) - len(old)
    return {d: d + shift for d in range(len(old)) if d + shift >= 0 and old[d] == new[d + shift]}


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of the call, by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _dims_arg(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value) if value is not None else list(range(rank))
    return [v % rank for v in values] if rank else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or (
        isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), Tensor)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rows: each gives the terms of one node, or None where this use of the operation is not understood


Row = Callable[[fx.Node], "tuple[Term, ...] | None"]


def _unary(node: fx.Node) -> tuple[Term, ...] | None:
    """The same values on the same axes: casts between floating dtypes, copies, marks, negation."""
    x = node.args[0]
    if not (is_float(x) and is_float(node)):
        return None
    return ((Operand(x, _same(x)),),)


def _dropout(node: fx.Node) -> tuple[Term, ...] | None:
    return None if _arg(node, 2, "train", True) else _unary(node)


def _sum(node: fx.Node) -> tuple[Term, ...]:
    """a + b, a - b; a number is a term that is the same for all channels."""
    return tuple((Operand(a, _broadcast(a, node)),) if not _is_number(a) else () for a in node.args[:2] if a != 0)


def _mul(node: fx.Node) -> tuple[Term, ...]:
    return (tuple(Operand(a, _broadcast(a, node)) for a in node.args[:2] if not _is_number(a)),)


def _div(node: fx.Node) -> tuple[Term, ...] | None:
    top, bottom = node.args[:2]
    if _is_number(top) or node.kwargs.get("rounding_mode"):
        return None
    gate = () if _is_number(bottom) else (Operand(bottom, _broadcast(bottom, node), linear=False),)
    return ((Operand(top, _broadcast(top, node)), *gate),)


def _where(node: fx.Node) -> tuple[Term, ...] | None:
    if len(node.args) != 3:
        return None
    gate = Operand(node.args[0], _broadcast(node.args[0], node), linear=False)
    return tuple(
        (Operand(a, _broadcast(a, node)), gate) if not _is_number(a) else (gate,) for a in node.args[1:3] if a != 0
    )


def _masked_fill(node: fx.Node) -> tuple[Term, ...]:
    x, mask, value = node.args[:3]
    gate = Operand(mask, _broadcast(mask, node), linear=False)
    fill: tuple[Term, ...] = () if value == 0 else ((gate,),)
    return ((Operand(x, _broadcast(x, node)), gate), *fill)


def _masked_scatter(node: fx.Node) -> tuple[Term, ...]:
    """Rows of ``source`` replace the rows of x that the mask selects; the mask must be the same along the channels."""
    x, mask, source = node.args[:3]
    last, rank = len(shape_of(source)) - 1, len(shape_of(node))
    gate = Operand(mask, _broadcast(mask, node), linear=False)
    return (Operand(x, _same(x)), gate), (Operand(source, {last: rank - 1}), gate)


def _permute(node: fx.Node) -> tuple[Term, ...]:
    x = node.args[0]
    order = _dims_arg(node.args[1], len(shape_of(x)))
    return ((Operand(x, {source: target for target, source in enumerate(order)}),),)


def _swap(node: fx.Node) -> tuple[Term, ...]:
    x = node.args[0]
    rank = len(shape_of(x))
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, 1)  # aten.t has no dims
    dims = _same(x)
    if rank >= 2:
        dims[a % rank], dims[b % rank] = b % rank, a % rank
    return ((Operand(x, dims),),)


def _movedim(node: fx.Node) -> tuple[Term, ...]:
    x = node.args[0]
    rank = len(shape_of(x))
    sources, targets = _dims_arg(node.args[1], rank), _dims_arg(node.args[2], rank)
    order: list[int] = [-1] * rank
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    rest = iter(d for d in range(rank) if d not in sources)
    order = [next(rest) if d < 0 else d for d in order]
    return ((Operand(x, {source: target for target, source in enumerate(order)}),),)


def _view(node: fx.Node) -> tuple[Term, ...]:
    return ((Operand(node.args[0], {}, view=True),),)


def _view_dtype(node: fx.Node) -> tuple[Term, ...] | None:
    return None  # a reinterpretation of bits


def _expand(node: fx.Node) -> tuple[Term, ...]:
    return ((Operand(node.args[0], _broadcast(node.args[0], node)),),)


def _except_dim(position: int, name: str = "dim") -> Row:
    """All dimensions pass except the one named by an argument (slice, roll, index_select, ...)."""

    def row(node: fx.Node) -> tuple[Term, ...]:
        x = node.args[0]
        rank = len(shape_of(x))
        dims = _dims_arg(_arg(node, position, name), rank) or list(range(rank))  # none named: the flattened tensor
        return ((Operand(x, _same(x, dims)),),)

    return row


def _slice(node: fx.Node) -> tuple[Term, ...]:
    """Other dimensions pass; along ``dim`` a channel axis passes if whole blocks of channels are taken."""
    x = node.args[0]
    dim = _arg(node, 1, "dim", 0) % len(shape_of(x))
    start, step = _arg(node, 2, "start", 0) or 0, _arg(node, 4, "step", 1)
    old, new = shape_of(x)[dim], shape_of(node)[dim]
    whole = old == new
    aligned = step == 1 and isinstance(start, int) and isinstance(old, int) and isinstance(new, int)
    start = start + old if aligned and start < 0 else start
    blocks = aligned and new > 0 and start % new == 0 and old % new == 0
    dims = _same(x) if whole else _same(x, [dim])
    return ((Operand(x, dims, regroup=dim if blocks and not whole else None),),)


def _split(node: fx.Node) -> tuple[Term, ...]:
    """The first part's shape stands for all; parts of equal size may cut the channel axis in whole blocks."""
    x = node.args[0]
    dim = _arg(node, 2, "dim", 0) % len(shape_of(x))
    sizes = {shape_of_part[dim] for shape_of_part in (tuple(v.shape) for v in node.meta["val"])}
    return ((Operand(x, _same(x, [dim]), regroup=dim if len(sizes) == 1 else None),),)


def _unbind(node: fx.Node) -> tuple[Term, ...]:
    x = node.args[0]
    dim = _arg(node, 1, "dim", 0) % len(shape_of(x))
    return ((Operand(x, {d: d - (d > dim) for d in range(len(shape_of(x))) if d != dim}),),)


def _getitem(node: fx.Node) -> tuple[Term, ...] | None:
    """One part of a split: what a part looks like is said by the row of the operation that made the parts."""
    parts = node.args[0]
    if not isinstance(parts, fx.Node) or name_of(parts) not in _PARTS:
        return None
    return ((Operand(parts, _same(node)),),)


def _squeeze(node: fx.Node) -> tuple[Term, ...]:
    """Dimensions of one vanish or appear; as for every view, row-major order is kept."""
    return _view(node)


def _cat(node: fx.Node) -> tuple[Term, ...]:
    """Other dimensions pass; parts of equal size along ``dim`` keep whole blocks of channels together."""
    dim = _arg(node, 1, "dim", 0) % len(shape_of(node))
    parts = [p for p in node.args[0] if shape_of(p) != (0,)]
    equal = len({shape_of(p)[dim] for p in parts}) == 1
    return tuple((Operand(p, _same(p, [dim]), regroup=dim if equal else None),) for p in parts)


def _stack(node: fx.Node) -> tuple[Term, ...]:
    dim = _arg(node, 1, "dim", 0) % len(shape_of(node))
    return tuple((Operand(p, {d: d + (d >= dim) for d in range(len(shape_of(p)))}),) for p in node.args[0])


def _pad(node: fx.Node) -> tuple[Term, ...]:
    x, pads = node.args[0], list(node.args[1])
    mode, value = ("constant", _arg(node, 2, "value", 0))
    if isinstance(value, str):
        mode, value = value, _arg(node, 3, "value", None)
    rank = len(shape_of(x))
    padded = [rank - 1 - i // 2 for i, p in enumerate(pads) if p != 0]
    fill: tuple[Term, ...] = ((),) if mode == "constant" and value not in (0, 0.0, None) else ()
    return ((Operand(x, _same(x, padded)),), *fill)


def _repeat(node: fx.Node) -> tuple[Term, ...]:
    return ((Operand(node.args[0], _broadcast(node.args[0], node)),),)


def _reduce(node: fx.Node) -> tuple[Term, ...]:
    """mean and sum over other dimensions."""
    x = node.args[0]
    rank = len(shape_of(x))
    gone = set(_dims_arg(_arg(node, 1, "dim"), rank))
    keep = bool(_arg(node, 2, "keepdim", False))
    left = [d for d in range(rank) if d not in gone]
    return ((Operand(x, {d: d if keep else left.index(d) for d in left}),),)


def _index(node: fx.Node) -> tuple[Term, ...] | None:
    """Advanced indexing: dimensions indexed by nothing pass; the indexed ones become new ones in their place, or in
    front if they are not neighbours."""
    x = node.args[0]
    used: list[int] = []
    dim = 0
    for index in node.args[1]:
        value = index.meta["val"] if isinstance(index, fx.Node) else None
        width = value.ndim if value is not None and value.dtype == torch.bool else 1
        used += range(dim, dim + width) if value is not None else []
        dim += width
    if not used:
        return _unary(node)
    free = [d for d in range(len(shape_of(x))) if d not in used]
    made = len(shape_of(node)) - len(free)
    neighbours = used == list(range(used[0], used[-1] + 1))
    return ((Operand(x, {d: i if neighbours and d < used[0] else i + made for i, d in enumerate(free)}),),)


def _gather(node: fx.Node) -> tuple[Term, ...]:
    x, dim, index = node.args[0], node.args[1], node.args[2]
    dims = {d: d for d in _same(x, [dim]) if shape_of(x)[d] == shape_of(node)[d]}
    return ((Operand(x, dims), Operand(index, _same(index), linear=False)),)


def _spatial(node: fx.Node) -> tuple[Term, ...]:
    """Linear in each channel on its own, over the trailing dimensions: average pooling, interpolation."""
    x = node.args[0]
    rank = len(shape_of(x))
    trailing = {"1d": 1, "2d": 2, "3d": 3}
    count = next((n for key, n in trailing.items() if key in str(node.target)), rank - 2)
    return ((Operand(x, _same(x, list(range(rank - count, rank)))),),)


def _linear(node: fx.Node) -> tuple[Term, ...]:
    """x W + b: the last dimension of the result is dimension 0 of W and b (a single vector has no such dimension)."""
    x, weight = node.args[0], node.args[1]
    bias = _arg(node, 2, "bias")
    last = len(shape_of(node)) - 1
    terms: list[Term] = [(Operand(x, _same(x, [-1])), Operand(weight, {0: last}))]
    if bias is not None:
        terms.append((Operand(bias, {0: last}),))
    return tuple(terms)


def _matmul_term(a: fx.Node, b: fx.Node, node: fx.Node) -> Term | None:
    rank_a, rank_b, rank = len(shape_of(a)), len(shape_of(b)), len(shape_of(node))
    if rank_a == 1 and rank_b == 1:
        return None
    if rank_b == 1:
        return (Operand(a, _same(a, [-1])), Operand(b, {}))
    if rank_a == 1:
        return (Operand(a, {}), Operand(b, {d: d - (d == rank_b - 1) for d in range(rank_b) if d != rank_b - 2}))
    new = shape_of(node)
    dims_a = {d: d + rank - rank_a for d in range(rank_a - 1)}
    dims_b = {d: d + rank - rank_b for d in range(rank_b) if d != rank_b - 2}
    dims_a = {s: t for s, t in dims_a.items() if shape_of(a)[s] == new[t]}
    dims_b = {s: t for s, t in dims_b.items() if shape_of(b)[s] == new[t]}
    return (Operand(a, dims_a), Operand(b, dims_b))


def _matmul(node: fx.Node) -> tuple[Term, ...] | None:
    """(A B): rows from A, columns from B."""
    term = _matmul_term(node.args[0], node.args[1], node)
    return None if term is None else (term,)


def _addmm(node: fx.Node) -> tuple[Term, ...] | None:
    """c + A B (also baddbmm, addbmm is not the same and has no row)."""
    term = _matmul_term(node.args[1], node.args[2], node)
    return None if term is None else ((Operand(node.args[0], _broadcast(node.args[0], node)),), term)


def _embedding(node: fx.Node) -> tuple[Term, ...]:
    weight, index = node.args[0], node.args[1]
    rank = len(shape_of(node))
    return ((Operand(weight, {1: rank - 1}), Operand(index, _same(index), linear=False)),)


def _conv(node: fx.Node) -> tuple[Term, ...] | None:
    """W * x + b. With groups each output channel sees other inputs, so no map across channels moves into W: no row."""
    x, weight, bias = node.args[0], node.args[1], _arg(node, 2, "bias")
    if _arg(node, 6, "groups", 1) != 1:
        return None
    batched = len(shape_of(x)) == len(shape_of(weight))
    channel = 1 if batched else 0
    source = 1 if "transpose" in str(node.target) else 0
    terms: list[Term] = [(Operand(x, {0: 0} if batched else {}), Operand(weight, {source: channel}))]
    if bias is not None:
        terms.append((Operand(bias, {0: channel}),))
    return tuple(terms)


def _attention(node: fx.Node) -> tuple[Term, ...]:
    """softmax(q k') v: mixes tokens of v, and passes its last dimension."""
    q, k, v = node.args[:3]
    rank = len(shape_of(node))
    gates = tuple(Operand(g, {d: d for d in range(rank - 2)}, linear=False) for g in (q, k))
    return ((Operand(v, {**{d: d for d in range(rank - 2)}, rank - 1: rank - 1}), *gates),)


def _einsum(node: fx.Node) -> tuple[Term, ...] | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    term = []
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        if len(set(letters)) != len(letters):
            return None
        term.append(Operand(operand, {d: output.index(c) for d, c in enumerate(letters) if c in output}))
    return (tuple(term),)


def _zeros(node: fx.Node) -> tuple[Term, ...]:
    """No term at all: zero is in every stream."""
    return ()


def _full(node: fx.Node) -> tuple[Term, ...]:
    return () if node.args[1] == 0 else ((),)


TABLE: dict[str, Row] = {
    # the same values
    **dict.fromkeys(
        ["normconvert.mark", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.detach_", "aten.to"]
        + ["aten._to_copy", "aten.type_as", "aten.lift_fresh_copy", "aten.neg", "aten.float", "aten.half"],
        _unary,
    ),
    **dict.fromkeys(["aten.dropout", "aten.feature_dropout", "aten.alpha_dropout"], _dropout),
    # sums and products
    **dict.fromkeys(["aten.add", "aten.sub", "aten.rsub"], _sum),
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.masked_scatter": _masked_scatter,
    # views and moves
    "aten.permute": _permute,
    **dict.fromkeys(["aten.transpose", "aten.t", "aten.swapaxes", "aten.swapdims", "aten.numpy_T"], _swap),
    "aten.movedim": _movedim,
    **dict.fromkeys(["aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"], _view),
    "aten.view.dtype": _view_dtype,
    **dict.fromkeys(["aten.squeeze", "aten.unsqueeze"], _squeeze),
    **dict.fromkeys(["aten.expand", "aten.expand_as", "aten.broadcast_to"], _expand),
    "aten.slice": _slice,
    **dict.fromkeys(["aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split"], _split),
    **dict.fromkeys(["aten.unbind", "aten.select"], _unbind),
    "<built-in function getitem>": _getitem,
    **dict.fromkeys(["aten.cat", "aten.concat", "aten.concatenate"], _cat),
    "aten.stack": _stack,
    **dict.fromkeys(["aten.pad", "aten.constant_pad_nd"], _pad),
    **dict.fromkeys(["aten.repeat", "aten.tile"], _repeat),
    "aten.repeat_interleave": _except_dim(2, "dim"),
    "aten.roll": _except_dim(2, "dims"),
    "aten.flip": _except_dim(1, "dims"),
    "aten.index_select": _except_dim(1),
    "aten.index": _index,
    "aten.gather": _gather,
    # linear over other dimensions
    **dict.fromkeys(["aten.mean", "aten.sum"], _reduce),
    **dict.fromkeys(
        ["aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d", "aten.adaptive_avg_pool1d"]
        + ["aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d", "aten.upsample_nearest2d", "aten.upsample_linear1d"]
        + ["aten.upsample_bilinear2d", "aten.upsample_bicubic2d", "aten._upsample_bicubic2d_aa"]
        + ["aten._upsample_bilinear2d_aa", "aten.upsample_nearest1d", "aten.upsample_trilinear3d"],
        _spatial,
    ),
    # linear maps
    "aten.linear": _linear,
    **dict.fromkeys(["aten.matmul", "aten.mm", "aten.bmm"], _matmul),
    **dict.fromkeys(["aten.addmm", "aten.baddbmm"], _addmm),
    "aten.embedding": _embedding,
    **dict.fromkeys(
        ["aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose1d", "aten.conv_transpose2d"]
        + ["aten.conv_transpose3d"],
        _conv,
    ),
    "aten.scaled_dot_product_attention": _attention,
    "aten.einsum": _einsum,
    # constants
    **dict.fromkeys(["aten.zeros", "aten.zeros_like", "aten.new_zeros"], _zeros),
    **dict.fromkeys(["aten.full", "aten.full_like", "aten.new_full"], _full),
}

_PARTS = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split", "aten.unbind"}

NEUTRAL = {
    "aten.sym_size",
    "aten._assert_tensor_metadata",
    "aten.zeros_like",
    "aten.ones_like",
    "aten.empty_like",
    "aten.full_like",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
}
"""Operations that look at a tensor's shape and dtype, never at its values."""

POINTWISE = {
    *["aten.add", "aten.sub", "aten.rsub", "aten.mul", "aten.div", "aten.to", "aten._to_copy", "aten.clone"],
    *["aten.eq", "aten.ne", "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.logical_not", "aten.logical_and"],
    *["aten.logical_or", "aten.bitwise_not", "aten.bitwise_and", "aten.bitwise_or", "aten.__and__", "aten.__or__"],
    *["aten.sigmoid", "aten.exp", "aten.neg", "aten.contiguous", "aten.type_as", "aten.where", "aten.expand"],
    *["aten.expand_as", "aten.clamp", "aten.tanh", "normconvert.mark", "aten.detach", "aten.pow", "aten.sqrt"],
    *["aten.rsqrt", "aten.reciprocal", "aten.abs", "aten.softplus"],
}
"""Element by element (after broadcasting): constant along an axis if every operand is."""


def name_of(node: fx.Node) -> str:
    """The operation without its overload, e.g. ``aten.add``; the full name if that has a row of its own."""
    if node.op != "call_function":
        return node.op
    full = str(node.target)
    return full if full in TABLE else full.rpartition(".")[0] if full.count(".") > 1 else full


def terms_of(node: fx.Node) -> tuple[Term, ...] | None:
    """The terms of ``node``; None if its operation has no row, or not for this use."""
    if node.op != "call_function":
        return None
    row = TABLE.get(name_of(node))
    return None if row is None else row(node)


def varies(node: fx.Node, place: Place) -> bool:
    """Whether a value may differ along the channels at ``place``. True when in doubt."""
    shape = shape_of(node)
    if place.dim >= len(shape) or shape[place.dim] == 1:
        return False
    name = name_of(node)
    if name in POINTWISE:
        for arg in node.all_input_nodes:
            source = carry_back(Operand(arg, _broadcast(arg, node)), place, node)
            if source is not None and varies(arg, source):
                return True
        return False
    if TABLE.get(name) in (_view, _squeeze, _permute, _swap):
        (((operand,),)) = TABLE[name](node)  # type: ignore[misc]
        source = carry_back(operand, place, node)
        return source is None or varies(operand.node, source)
    return name not in ("aten.full", "aten.ones", "aten.zeros", "aten.new_ones", "aten.new_zeros", "aten.ones_like")
