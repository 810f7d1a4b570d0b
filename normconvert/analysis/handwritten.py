"""Norms that a model's code writes out, recognised by their algebra.

LayerNorm is ``(x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps)``, RMSNorm ``x * rsqrt(mean(x^2) + eps)``; the root
may be a quotient or a power, and its operand another cast of the same x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, is_float, shape_of
from normconvert.analysis.operations import argument, name_of, readers

CASTS = {"aten.to", "aten._to_copy", "aten.float", "aten.type_as"}
"""The same values in another dtype."""


@dataclass(frozen=True)
class Handwritten:
    """A norm that is written out.

    Attributes:
        x: what it reads.
        place: the axis that it normalises.
        eps: added to the mean square.
        read: the node on the way to the normalised value that reads ``x``.
        inside: the nodes between ``x`` and the normalised value; empty if one of them is read by others, too.
    """

    x: fx.Node
    place: ChannelAxis
    eps: float
    read: fx.Node
    inside: frozenset[fx.Node]


def layer_norm_by_hand(node: fx.Node) -> Handwritten | None:
    """Match the normalised value: ``centred * rsqrt(variance + eps)`` or ``centred / sqrt(variance + eps)``."""
    bases: set[Any]
    for top, inside, eps, nodes in _quotients(node):
        if len(nodes) > 2 or name_of(nodes[0]) == "aten.pow":
            continue
        # Both halves must be of the same x over the same axis: otherwise this is a quotient of two values.
        centred = _centred(top)
        if centred is None or _variance(inside) != centred:
            continue
        x, dim = centred
        # The value and the variance may be centred by operations of their own.
        square: Any = inside.args[0]
        bases = {top, square.args[0]}
        found = {*nodes, inside, square, *bases, *(base.args[1] for base in bases)}
        return Handwritten(x, ChannelAxis(dim, int(shape_of(x)[dim])), eps, top, _closed(found, node))
    return None


def rms_norm_by_hand(node: fx.Node) -> Handwritten | None:
    """Match the normalised value ``x * rsqrt(mean(x^2) + eps)`` in its spellings."""
    for top, inside, eps, nodes in _quotients(node):
        square = _mean_square(inside)
        if square is None:
            continue
        base, dim = square
        x, casts = top, list[fx.Node]()
        if base is not top:
            # The mean square may be taken of another cast of x than the value.
            (x, above), (other, below) = _uncast(top), _uncast(base)
            if x is not other:
                continue
            casts = [*above, *below]
        if not isinstance(shape_of(x)[dim], int):
            continue
        found = {*nodes, inside, inside.args[0], *casts}
        closed = _closed(found, node)
        # Who reads the mean square otherwise sees more than a norm shows.
        if closed:
            read = node if x is top else _first(top)
            return Handwritten(x, ChannelAxis(dim, int(shape_of(x)[dim])), eps, read, closed)
    return None


def reads_centred(user: fx.Node, x: fx.Node, place: ChannelAxis) -> bool:
    """Whether ``user`` sees x at ``place`` through P only: x - mean(x), or a mean that goes nowhere else."""
    centred = _centred(user)
    # Where a dimension holds more than the channels, its mean is not theirs.
    if centred is not None and centred == (x, place.dim) and place.whole:
        return True
    mean = _mean_over(user)
    if mean is not None and mean == (x, place.dim) and place.whole:
        # The mean itself tells the mean, so all of its readers must take it from the same x.
        return all(_centred(u) == mean and u.args[0] is x for u in user.users)
    return False


def plain(node: fx.Node) -> bool:
    """No ``alpha`` that multiplies the second operand."""
    return bool(node.kwargs.get("alpha", 1) == 1)


def is_number(value: object) -> bool:
    """Whether an argument is a number and no value of the graph."""
    return isinstance(value, (int, float))


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, float, tuple[fx.Node, ...]]]:
    """``top / sqrt(inside + eps)`` in its spellings -> top, inside, eps, and the nodes that make the divisor."""
    name = name_of(node)
    if name not in ("aten.mul", "aten.div") or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return
    # A product may stand either way round, a quotient may not.
    pairs: list[tuple[Any, Any]] = [(node.args[0], node.args[1])]
    pairs += [(node.args[1], node.args[0])] if name == "aten.mul" else []
    for top, bottom in pairs:
        nodes: tuple[Any, ...] = (bottom,)
        root: Any = bottom
        if name == "aten.mul" and name_of(bottom) == "aten.reciprocal":
            root = bottom.args[0]
            nodes = (bottom, root)
        inverse = name == "aten.mul" and root is bottom
        power = -0.5 if inverse else 0.5
        named = name_of(root) == ("aten.rsqrt" if inverse else "aten.sqrt")
        if not named and not (name_of(root) == "aten.pow" and root.args[1] == power):
            continue
        inside = _plus_eps(root.args[0])
        if inside is not None and isinstance(inside[0], fx.Node):
            yield top, inside[0], inside[1], (*nodes, root.args[0])


def _closed(nodes: set[Any], result: fx.Node) -> frozenset[fx.Node]:
    """The nodes, if none of them but the result is read by others."""
    if any(user is not result and user not in nodes for node in nodes for user in readers(node)):
        return frozenset()
    return frozenset({*nodes, result})


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


def _centred(node: Any) -> tuple[fx.Node, int] | None:
    """``x - mean(x)`` -> (x, dim)."""
    if not (isinstance(node, fx.Node) and name_of(node) == "aten.sub" and plain(node)):
        return None
    mean = _mean_over(node.args[1])
    return mean if mean is not None and mean[0] is node.args[0] else None


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


def _variance(node: Any) -> tuple[fx.Node, int] | None:
    """``mean((x - mean(x))^2)`` -> (x, dim)."""
    square = _mean_square(node)
    centred = _centred(square[0]) if square is not None else None
    return centred if square is not None and centred is not None and centred[1] == square[1] else None


def _plus_eps(node: Any) -> tuple[Any, float] | None:
    if isinstance(node, fx.Node) and name_of(node) == "aten.add" and plain(node) and is_number(node.args[1]):
        return node.args[0], float(node.args[1])  # type: ignore[arg-type]
    return None
