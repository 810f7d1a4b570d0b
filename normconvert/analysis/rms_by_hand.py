"""RMSNorm written by hand: ``x * rsqrt(mean(x^2) + eps)``.

The root may be a quotient or a power, and what it is of another cast of the same x, as language models write it; so
casts are passed over here, which end a form of :mod:`normconvert.analysis.handwritten`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, is_float, shape_of
from normconvert.analysis.handwritten import HandWritten, closed_between
from normconvert.tracing.operations import argument, name_of

CASTS = {"aten.to", "aten._to_copy", "aten.float", "aten.type_as"}
"""The same values in another dtype."""


def rms_norm_by_hand(node: fx.Node) -> HandWritten | None:
    """Match the normalised value ``x * rsqrt(mean(x^2) + eps)`` in its spellings."""
    for top, inside, eps in _quotients(node):
        square = _mean_square(inside)
        if square is None:
            continue
        base, dim = square
        x = top
        if base is not top:
            # The mean square may be taken of another cast of x than the value.
            x = _uncast(top)[0]
            if x is not _uncast(base)[0]:
                continue
        if not isinstance(shape_of(x)[dim], int):
            continue
        closed = closed_between(x, node)
        # Who reads the mean square otherwise sees more than a norm shows.
        if closed:
            read = node if x is top else _first(top)
            return HandWritten(x, ChannelAxis(dim, int(shape_of(x)[dim])), eps, read, closed)
    return None


def plain(node: fx.Node) -> bool:
    """No ``alpha`` that multiplies the second operand."""
    return bool(node.kwargs.get("alpha", 1) == 1)


def is_number(value: object) -> bool:
    """Whether an argument is a number and no value of the graph."""
    return isinstance(value, (int, float))


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, float]]:
    """``top / sqrt(inside + eps)`` in its spellings -> top, inside, eps."""
    name = name_of(node)
    if name not in ("aten.mul", "aten.div") or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return
    # A product may stand either way round, a quotient may not.
    pairs: list[tuple[Any, Any]] = [(node.args[0], node.args[1])]
    pairs += [(node.args[1], node.args[0])] if name == "aten.mul" else []
    for top, bottom in pairs:
        root: Any = bottom
        if name == "aten.mul" and name_of(bottom) == "aten.reciprocal":
            root = bottom.args[0]
        inverse = name == "aten.mul" and root is bottom
        power = -0.5 if inverse else 0.5
        named = name_of(root) == ("aten.rsqrt" if inverse else "aten.sqrt")
        if not named and not (name_of(root) == "aten.pow" and root.args[1] == power):
            continue
        inside = _plus_eps(root.args[0])
        if inside is not None and isinstance(inside[0], fx.Node):
            yield top, inside[0], inside[1]


def _uncast(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What is cast, and the casts, from the last to the first."""
    casts = []
    while name_of(node) in CASTS and is_float(node) and isinstance(node.args[0], fx.Node):
        casts.append(node)
        node = node.args[0]
    return node, casts


def _first(node: fx.Node) -> fx.Node:
    """The first of some casts one behind the other."""
    return _uncast(node)[1][-1]


def _mean_over(node: Any) -> tuple[fx.Node, int] | None:
    """``mean(x, one dim, keepdim=True)`` -> (x, dim)."""
    # Without keepdim the mean of one token would be subtracted from another's channels.
    if not (isinstance(node, fx.Node) and name_of(node) == "aten.mean" and argument(node, 2, "keepdim") is True):
        return None
    x, dims = node.args[0], argument(node, 1, "dim")
    if not (isinstance(x, fx.Node) and isinstance(dims, (list, tuple)) and len(dims) == 1):
        return None
    return x, int(dims[0]) % len(shape_of(x))


def _mean_square(node: Any) -> tuple[fx.Node, int] | None:
    """``mean(x^2)`` -> (x, dim)."""
    outer = _mean_over(node)
    if outer is None:
        return None
    square, dim = outer
    if (name_of(square) == "aten.pow" and square.args[1] == 2) or (
        name_of(square) in ("aten.mul", "aten.square") and square.args[0] is square.args[-1]
    ):
        base = square.args[0]
        return (base, dim) if isinstance(base, fx.Node) else None
    return None


def _plus_eps(node: Any) -> tuple[Any, float] | None:
    if isinstance(node, fx.Node) and name_of(node) == "aten.add" and plain(node) and is_number(node.args[1]):
        return node.args[0], float(node.args[1])  # type: ignore[arg-type]
    return None
