"""Vectors along a channel axis, written as data: what a plan multiplies by or adds, in terms of stored tensors.

An expression is a number, the name of a tensor with one value a channel, or a list ``[operation, *operands]``::

    ["mul", "bn1.weight", ["rsqrt", ["add", "bn1.running_var", 1e-05]]]

is a BatchNorm's scale. It is JSON, and :data:`OPERATIONS` is the only place that gives the operations a meaning, but
for ``["slice", x, start, stop]``, a part of a vector, and ``["limit", name]``, the largest number of a tensor's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Expression = Any
"""A number, a name, or a list of an operation's name and its operands, which are expressions."""

Lookup = Callable[[str], Tensor]


class Clip(NamedTuple):
    """relu(a x + b) = scale * clamp(x - start, lower, upper), channel by channel."""

    scale: Tensor
    start: Tensor
    lower: Tensor
    upper: Tensor


def _clip(a: Tensor, b: Tensor, limit: Tensor) -> Clip:
    """The vectors of :class:`Clip`, for every |x| <= ``limit``.

    relu(a x + b) = a max(x + b / a, 0) if a > 0, a min(x + b / a, 0) if a < 0. A channel that is constant because
    a = 0, or zero because no such x reaches -b / a, is that constant.
    """
    flat = a == 0
    # Divided by one where a = 0: the quotient is thrown away there, but 0 / 0 would be NaN first.
    start = -b / torch.where(flat, torch.ones_like(a), a)
    # Only where b <= 0: with b > 0 and a start beyond the limit the channel is never zero, and no constant.
    constant = flat | ((start.abs() > limit) & (b <= 0))
    value = b.clamp_min(0.0)
    inf = torch.full_like(a, torch.inf)
    lower = torch.where(constant, value, torch.where(a > 0, 0.0, -inf))
    upper = torch.where(constant, value, torch.where(a > 0, inf, 0.0))
    # The bounds hold the constant itself already: a scale would be applied to it once more.
    return Clip(a.masked_fill(constant, 1.0), start.masked_fill(constant, 0.0), lower, upper)


def _power_above(a: Tensor) -> Tensor:
    """A power of two that is at least sqrt(2) max|a|; one if all of them are zero."""
    most = a.abs().amax() * 2.0**0.5
    return torch.where(most > 0, torch.exp2(most.log2().ceil()), torch.ones_like(most))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "power_above": _power_above,
    "clip_scale": lambda *x: _clip(*x).scale,
    "clip_start": lambda *x: _clip(*x).start,
    "clip_lower": lambda *x: _clip(*x).lower,
    "clip_upper": lambda *x: _clip(*x).upper,
}


def evaluate(expression: Expression, lookup: Lookup, *, bound: bool = False) -> Tensor:
    """The vector in float64, shape (channels,), or () if the expression holds no tensor.

    Args:
        expression: see above.
        lookup: gives a stored tensor in any floating dtype; whatever its shape, its elements are taken in row-major
            order.
        bound: it may be infinite.

    Raises:
        ValueError: the result is not finite: a negative variance, say. The message names the tensors.
        KeyError: an operation that is not in the table.
    """
    value = _value(expression, lookup)
    # Without values there is nothing to be finite: shapes are worked out on the meta device.
    if value.device.type != "meta" and not bool((~value.isnan() if bound else value.isfinite()).all()):
        names = ", ".join(dict.fromkeys(names_in(expression)))
        raise ValueError(f"a scale or shift made of {names} is not finite: is a running variance negative?")
    return value


def _value(expression: Expression, lookup: Lookup) -> Tensor:
    if isinstance(expression, str):
        return lookup(expression).to(torch.float64).reshape(-1)
    if isinstance(expression, (int, float)):
        return torch.tensor(float(expression), dtype=torch.float64)
    name, *operands = expression
    if name == "limit":
        return torch.tensor(torch.finfo(lookup(operands[0]).dtype).max, dtype=torch.float64)
    if name == "slice":
        return _value(operands[0], lookup)[int(operands[1]) : int(operands[2])]
    return OPERATIONS[name](*(_value(operand, lookup) for operand in operands))


def names_in(expression: Expression) -> Iterator[str]:
    """The names of the tensors that an expression reads."""
    if isinstance(expression, str):
        yield expression
    # Of a limit only the dtype is read, which the header holds.
    elif not isinstance(expression, (int, float)) and expression[0] != "limit":
        for operand in expression[1:]:
            yield from names_in(operand)


def with_limits(expression: Expression, limit: Callable[[str], float]) -> Expression:
    """The same with numbers for ``["limit", name]``: of the dtype that the tensor is going to have."""
    if isinstance(expression, (str, int, float)):
        return expression
    if expression[0] == "limit":
        return limit(expression[1])
    return [expression[0], *(with_limits(operand, limit) for operand in expression[1:])]


def times(a: Expression, b: Expression) -> Expression:
    """a * b, without products by one."""
    if a == 0 or b == 0:
        return 0
    return b if a == 1 else a if b == 1 else ["mul", a, b]


def plus(a: Expression, b: Expression) -> Expression:
    """a + b, without sums with zero."""
    return b if a == 0 else a if b == 0 else ["add", a, b]


def minus(a: Expression, b: Expression) -> Expression:
    """a - b, without differences with zero."""
    return a if b == 0 else ["neg", b] if a == 0 else ["sub", a, b]


def part(a: Expression, start: int, stop: int, size: int) -> Expression:
    """Channels ``start`` to ``stop`` of a vector of ``size``."""
    return a if (start, stop) == (0, size) or isinstance(a, (int, float)) else ["slice", a, start, stop]
