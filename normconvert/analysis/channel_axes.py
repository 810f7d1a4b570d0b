"""Where a value carries the channels of a stream, and how an operand hands them to a result.

A value carries the channels on one factor of one dimension: dimension ``dim`` has ``outer * size * inner`` elements
and the middle factor is the channel (`ChannelAxis`). So a channel axis that a view merges into ``batch * channels *
height`` and splits again later is still the same axis.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

Dims = Mapping[int, int]
"""Dimension of an operand -> dimension of the result where it arrives unchanged."""


@dataclass(frozen=True)
class ChannelAxis:
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
        slot: dimension of the result in which the operand is one of several (stack).
    """

    node: fx.Node
    dims: Dims
    linear: bool = True
    view: bool = False
    regroup: int | None = None
    slot: int | None = None


class NoPlace(enum.Enum):
    """What an operand is to channels of the result that it does not carry."""

    CONSTANT = enum.auto()
    """The same for all of them."""
    LOST = enum.auto()
    """They are made of its values, but cut, mixed or rearranged."""


Term = tuple[Operand, ...]
"""A product of operands; an empty product is a constant, the same for all channels."""


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape of a value; symbolic sizes as sympy expressions. For a tuple of tensors, that of the first."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = next((v for v in value if isinstance(v, Tensor)), None)
    if not isinstance(value, Tensor):
        return ()
    return sizes_of(value)


def sizes_of(x: Tensor) -> tuple[Any, ...]:
    """The shape, with sizes that depend on data as expressions."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in x.shape)


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
    # sympy cancels common factors: a whole quotient has the denominator one.
    ratio = a / b
    numerator, denominator = ratio.as_numer_denom()
    return numerator if denominator == 1 else None


def reshaped(place: ChannelAxis, old: Sequence[Any], new: Sequence[Any]) -> ChannelAxis | None:
    """The place after a row-major reshape, or None if the channel axis is cut."""
    # Row-major order is kept, so the axis is known by the number of elements before it and behind it.
    before = _product(old[: place.dim]) * place.outer
    after = place.inner * _product(old[place.dim + 1 :])
    for dim in range(len(new)):
        outer = _quotient(before, _product(new[:dim]))
        inner = _quotient(after, _product(new[dim + 1 :]))
        if outer is not None and inner is not None and outer * place.size * inner == new[dim]:
            return ChannelAxis(dim, place.size, outer, inner)
    return None


def carry_forward(operand: Operand, place: ChannelAxis, result: fx.Node) -> ChannelAxis | None:
    """Where the channels of ``operand`` at ``place`` are in ``result``; None if they do not arrive."""
    old, new = shape_of(operand.node), shape_of(result)
    if operand.view:
        return reshaped(place, old, new)
    if operand.regroup is not None and place.dim == operand.regroup:
        return _regrouped(place, new[operand.regroup])
    target = operand.dims.get(place.dim)
    # A rule may name a dimension that this very call cuts or stretches (the unequal parts of a split): its size tells.
    return None if target is None or old[place.dim] != new[target] else replace(place, dim=target)


def carry_back(operand: Operand, place: ChannelAxis, result: fx.Node) -> ChannelAxis | NoPlace:
    """Where ``operand`` carries the channels that ``result`` has at ``place``, or what it is to them.

    An operand whose channels are lost is no factor by channel if another one of its term carries them: a linear map is
    a sum over its input's own channels, of which each result's channel sees all.
    """
    old, new = shape_of(operand.node), shape_of(result)
    if operand.view:
        return reshaped(place, new, old) or NoPlace.LOST
    if operand.regroup is not None and place.dim == operand.regroup:
        return _regrouped(place, old[operand.regroup]) or NoPlace.LOST
    for source, target in operand.dims.items():
        if target == place.dim:
            return replace(place, dim=source) if old[source] == new[target] else NoPlace.LOST
    hidden = any(size != 1 for dim, size in enumerate(old) if dim not in operand.dims)
    return NoPlace.LOST if hidden or place.dim == operand.slot else NoPlace.CONSTANT


def _regrouped(place: ChannelAxis, size: Any) -> ChannelAxis | None:
    outer = _quotient(size, place.size * place.inner)
    return None if outer is None else replace(place, outer=outer)
