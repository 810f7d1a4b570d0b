"""The terms of operations that move values and change none: permutations, views, slices, parts, paddings, indexing.

Rules as those of `normconvert.analysis.axis_rules`; `normconvert.analysis.op_table` lists which operation has which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from normconvert.analysis.axis_rules import Call, broadcast, dims_argument, kept_dims, unary_rule
from normconvert.analysis.channel_axes import Operand, Term, shape_of
from normconvert.tracing.operations import GETITEM, SPLITS, argument, name_of

PARTS = SPLITS | {"aten.unbind"}
"""Operations whose result is a tuple of parts."""


def permute_rule(node: Call) -> tuple[Term, ...]:
    """Dimensions in another order."""
    x = node.args[0]
    order = dims_argument(node.args[1], len(shape_of(x)))
    return ((Operand(x, {source: target for target, source in enumerate(order)}),),)


def swap_rule(node: Call) -> tuple[Term, ...]:
    """Two dimensions change places."""
    x = node.args[0]
    rank = len(shape_of(x))
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)  # aten.t and aten.mT name none
    dims = kept_dims(x)
    if rank >= 2:
        dims[a % rank], dims[b % rank] = b % rank, a % rank  # aten.t takes a vector and leaves it
    return ((Operand(x, dims),),)


def reverse_rule(node: Call) -> tuple[Term, ...]:
    """All dimensions in reverse order: ``x.T``."""
    x = node.args[0]
    rank = len(shape_of(x))
    return ((Operand(x, {d: rank - 1 - d for d in range(rank)}),),)


def movedim_rule(node: Call) -> tuple[Term, ...]:
    """Dimensions move."""
    x = node.args[0]
    rank = len(shape_of(x))
    sources, targets = dims_argument(node.args[1], rank), dims_argument(node.args[2], rank)
    order: list[int] = [-1] * rank
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    rest = iter(d for d in range(rank) if d not in sources)
    order = [next(rest) if d < 0 else d for d in order]
    return ((Operand(x, {source: target for target, source in enumerate(order)}),),)


def view_rule(node: Call) -> tuple[Term, ...]:
    """Row-major order is kept."""
    return ((Operand(node.args[0], {}, view=True),),)


def expand_rule(node: Call) -> tuple[Term, ...]:
    """Dimensions of one are stretched."""
    return ((Operand(node.args[0], broadcast(node.args[0], node)),),)


def slice_rule(node: Call) -> tuple[Term, ...]:
    """Other dimensions pass; along ``dim`` a channel axis passes if whole blocks of channels are taken."""
    x = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(shape_of(x))
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    old, new = shape_of(x)[dim], shape_of(node)[dim]
    whole = old == new
    aligned = step == 1 and isinstance(start, int) and isinstance(old, int) and isinstance(new, int)
    start = start + old if aligned and start < 0 else start
    # A part that begins at a multiple of its own length begins with channel 0, if the channels divide its length.
    blocks = aligned and new > 0 and start % new == 0 and old % new == 0
    dims = kept_dims(x) if whole else kept_dims(x, [dim])
    return ((Operand(x, dims, regroup=dim if blocks and not whole else None),),)


def split_rule(node: Call) -> tuple[Term, ...]:
    """The first part's shape stands for all; parts of equal size may cut the channel axis in whole blocks."""
    x = node.args[0]
    dim = argument(node, 2, "dim", 0) % len(shape_of(x))
    sizes = [part.shape[dim] for part in node.meta["val"]]
    equal = all(isinstance(size, int) and size == sizes[0] for size in sizes)
    return ((Operand(x, kept_dims(x, [dim]), regroup=dim if equal else None),),)


def cut_of(node: Call) -> tuple[fx.Node, int, int] | None:
    """The value of which another is a part without gaps: the value, the dimension, and where the part begins."""
    if name_of(node) == "aten.slice":
        x, dim = node.args[0], argument(node, 1, "dim", 0) % len(shape_of(node))
        start, size = argument(node, 2, "start", 0) or 0, shape_of(x)[dim]
        if argument(node, 4, "step", 1) != 1 or not isinstance(start, int) or not isinstance(size, int):
            return None
        return x, dim, min(max(start + size if start < 0 else start, 0), size)
    parts: Call = node.args[0] if name_of(node) == GETITEM else None
    if not isinstance(parts, fx.Node) or name_of(parts) not in SPLITS:
        return None
    dim = argument(parts, 2, "dim", 0) % len(shape_of(node))
    source: Call = parts.args[0]
    before = [part.shape[dim] for part in parts.meta["val"]][: node.args[1]]
    return (source, dim, sum(before)) if all(isinstance(size, int) for size in before) else None


def unbind_rule(node: Call) -> tuple[Term, ...]:
    """One dimension vanishes: unbind, select."""
    x = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(shape_of(x))
    return ((Operand(x, {d: d - (d > dim) for d in range(len(shape_of(x))) if d != dim}),),)


def getitem_rule(node: Call) -> tuple[Term, ...] | None:
    """One part of a split: what a part looks like is said by the rule of the operation that made the parts."""
    parts = node.args[0]
    # Of other tuples (a pool's values and indices) each part is something else.
    if not isinstance(parts, fx.Node) or name_of(parts) not in PARTS:
        return None
    return ((Operand(parts, kept_dims(node)),),)


def cat_rule(node: Call) -> tuple[Term, ...]:
    """Other dimensions pass; parts of equal size along ``dim`` keep whole blocks of channels together."""
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    # torch passes over an empty vector here, whatever the shape of the others.
    parts = [p for p in node.args[0] if shape_of(p) != (0,)]
    equal = len({shape_of(p)[dim] for p in parts}) == 1
    return tuple((Operand(p, kept_dims(p, [dim]), regroup=dim if equal else None),) for p in parts)


def stack_rule(node: Call) -> tuple[Term, ...]:
    """One dimension appears."""
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    return tuple((Operand(p, {d: d + (d >= dim) for d in range(len(shape_of(p)))}, slot=dim),) for p in node.args[0])


def pad_rule(node: Call) -> tuple[Term, ...]:
    """Dimensions that are not padded pass; a number other than zero is a constant."""
    x, pads = node.args[0], list(node.args[1])
    mode, value = ("constant", argument(node, 2, "value", 0))
    if isinstance(value, str):
        mode, value = value, argument(node, 3, "value", None)
    rank = len(shape_of(x))
    # Pads are given in pairs, for the last dimension first.
    padded = [rank - 1 - i // 2 for i, p in enumerate(pads) if p != 0]
    fill: tuple[Term, ...] = ((),) if mode == "constant" and value not in (0, 0.0, None) else ()
    return ((Operand(x, kept_dims(x, padded)),), *fill)


def repeat_rule(node: Call) -> tuple[Term, ...]:
    """Dimensions that are not repeated pass."""
    return ((Operand(node.args[0], broadcast(node.args[0], node)),),)


def index_rule(node: Call) -> tuple[Term, ...] | None:
    """Advanced indexing: dimensions indexed by nothing pass.

    The indexed ones become new ones in their place, or in front if they are not neighbours.
    """
    x = node.args[0]
    used = _indexed(node.args[1])
    if not used:
        return unary_rule(node)
    return ((Operand(x, _arrivals(x, used, len(shape_of(node)) - len(shape_of(x)) + len(used))),),)


def index_put_rule(node: Call) -> tuple[Term, ...] | None:
    """``x[indices] = values``, or ``+=``: dimensions indexed by nothing pass, of x and of what is put there."""
    x, indices, values = node.args[:3]
    used = _indexed(indices)
    shapes = [_index_shape(index) for index in indices if isinstance(index, fx.Node)]
    if not used:  # all of x, by one index that is no tensor
        return None
    made = max(len(shape) for shape in shapes)
    # Values are stretched to what indexing would read, from the last dimension on.
    before = len(shape_of(x)) - len(used) + made - len(shape_of(values))
    arrivals = {target - before: d for d, target in _arrivals(x, used, made).items() if target >= before}
    return (Operand(x, kept_dims(x, used)),), (Operand(values, arrivals),)


def _indexed(indices: Sequence[Any]) -> list[int]:
    """The dimensions that are indexed: a mask uses up as many as it has, an index of integers one."""
    used: list[int] = []
    dim = 0
    for index in indices:
        value = index.meta["val"] if isinstance(index, fx.Node) else None
        width = value.ndim if value is not None and value.dtype == torch.bool else 1
        used += range(dim, dim + width) if value is not None else []
        dim += width
    return used


def _index_shape(index: Call) -> tuple[Any, ...]:
    """The shape that an index gives: a mask is a list of positions."""
    return shape_of(index)[:1] if index.meta["val"].dtype == torch.bool else shape_of(index)


def _arrivals(x: Call, used: list[int], made: int) -> dict[int, int]:
    """Dimension of x that nothing indexes -> its dimension behind the indexing, which makes ``made`` new ones."""
    free = [d for d in range(len(shape_of(x))) if d not in used]
    neighbours = used == list(range(used[0], used[-1] + 1))
    return {d: i if neighbours and d < used[0] else i + made for i, d in enumerate(free)}


def gather_rule(node: Call) -> tuple[Term, ...]:
    """Dimensions of equal size other than the gathered one pass."""
    x, dim, index = node.args[0], node.args[1], node.args[2]
    # The index may be smaller than x along other dimensions, and then only the first channels arrive.
    dims = {d: d for d in kept_dims(x, [dim]) if shape_of(x)[d] == shape_of(node)[d]}
    return ((Operand(x, dims), Operand(index, kept_dims(index), linear=False)),)
