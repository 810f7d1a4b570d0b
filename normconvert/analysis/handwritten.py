"""LayerNorm written by hand, whatever its spelling: found by computing with what each value is, not by its shape.

For a value x and one of its dimensions, of d channels, let m = mean(x) and v = mean((x - m)^2). A value of the graph
may be, exactly,

- linear: a x + b m, which is a Px if b = -a;
- a square of that, channel by channel;
- a statistic: s (p mean(x^2) + q m^2 + e)^r, which is one of v alone if q = -p;
- normalised: k Px / sqrt(v + e).

Each operation makes one of these of others (:class:`Forms`), so ``x.var(-1, unbiased=False)``, ``torch.var_mean``,
``mean(x * x) - mean(x) ** 2``, ``c / c.norm() * sqrt(d)`` and the textbook's spelling are one function. k = 1 is LN.
What has no rule here has no form. Arithmetic in numbers only: a cast on the way ends a form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.analysis.norm_forms import (
    CLOSE,
    Form,
    Linear,
    Normalised,
    Square,
    Statistic,
    fits,
    mean_square,
    normalised,
    same_channels,
)
from normconvert.tracing.operations import GETITEM, STRETCHES, VIEWS, argument, name_of, readers

MOST = 6
"""Forms of one value: of x itself, of x^2, of x - m."""
SUMS = {"aten.add": 1.0, "aten.sub": -1.0, "aten.subtract": -1.0}
PRODUCTS = {"aten.mul", "aten.multiply"}
QUOTIENTS = {"aten.div", "aten.divide", "aten.true_divide"}
SPREADS = {"aten.var": 1.0, "aten.std": 0.5, "aten.var_mean": 1.0, "aten.std_mean": 0.5}
"""Variances and deviations -> the power of the variance that they are."""


@dataclass(frozen=True)
class HandWritten:
    """A norm that is written out.

    Attributes:
        x: what it reads.
        place: where that has its channels.
        eps: added to the mean square.
        read: the node by which it reads them.
        inside: see :func:`closed_between`.
    """

    x: fx.Node
    place: ChannelAxis
    eps: float
    read: fx.Node
    inside: frozenset[fx.Node]


def closed_between(x: fx.Node, result: fx.Node) -> frozenset[fx.Node]:
    """The nodes on all ways from ``x`` to ``result``, ``result`` included; none if one of them is read by others, too.

    Where there are none, what is between the two sees more of ``x`` than ``result`` shows.
    """
    found, todo = {result}, [result]
    while todo:
        # What stands before x does not come from it.
        new = {source for source in todo.pop().all_input_nodes if x < source} - found
        found |= new
        todo += new
    between: set[fx.Node] = set()
    for node in sorted(found):
        if any(source is x or source in between for source in node.all_input_nodes):
            between.add(node)
    others = (user for node in between if node is not result for user in readers(node))
    return frozenset() if any(user not in between for user in others) else frozenset(between)


class Forms:
    """What the values of a graph are, of values before them.

    Args:
        nodes: in execution order.
    """

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._of: dict[fx.Node, list[Form]] = {}
        self.norms: dict[fx.Node, HandWritten] = {}
        for node in nodes:
            if node.op != "call_function":
                continue
            made = [form for form in self._made(node) if form is not None and fits(form, node)]
            for form in made:
                if isinstance(form, Normalised) and math.isclose(form.k, 1, rel_tol=CLOSE) and self._is_norm(form):
                    place = ChannelAxis(form.dim, int(shape_of(form.x)[form.dim]))
                    self.norms[node] = HandWritten(form.x, place, form.eps, form.read, closed_between(form.x, node))
            # What a norm gives is a value of its own: twice a norm is none.
            if made and node not in self.norms:
                self._of[node] = made[:MOST]

    def _is_norm(self, form: Normalised) -> bool:
        return any(one.centred for one in self._of.get(form.read, ()) if one.x is form.x)

    def reads_centred(self, user: fx.Node, x: fx.Node, place: ChannelAxis) -> bool:
        """Whether ``user`` sees x at ``place`` through P only: x - m, a variance, or a mean that ends in such."""
        # Where a dimension holds more than the channels, its mean is not theirs.
        if not place.whole:
            return False
        if name_of(user) in ("aten.var_mean", "aten.std_mean"):
            parts: Iterator[fx.Node] = readers(user)
            return _spread_over(user) == (x, place.dim) and all(self.reads_centred(part, x, place) for part in parts)
        forms = [form for form in self._of.get(user, ()) if form.x is x and form.dim in (None, place.dim)]
        if any(form.centred for form in forms):
            return True
        # The mean itself tells the mean, so all of its readers must take it from the same x.
        return bool(forms) and all(self.reads_centred(reader, x, place) for reader in readers(user))

    def _made(self, node: fx.Node) -> Iterator[Form | None]:
        name = name_of(node)
        if name in SUMS and _plain(node):
            yield from self._sum(node, SUMS[name])
        elif name == "aten.rsub" and _plain(node):
            yield from (form.times(-1) for form in self._sum(node, -1.0))
        elif name in PRODUCTS and _plain(node):
            yield from self._product(node)
        elif name in QUOTIENTS and _plain(node):
            yield from self._quotient(node)
        elif name in ("aten.mean", "aten.sum"):
            yield from self._averaged(node, name == "aten.sum")
        elif name in ("aten.var", "aten.std"):
            yield from self._spread(node)
        elif name == GETITEM and isinstance(node.args[0], fx.Node) and name_of(node.args[0]) in SPREADS:
            yield from self._spread(node.args[0], mean=bool(node.args[1] == 1))
        elif name == "aten.linalg_vector_norm":
            yield from self._length(node)
        elif name in _POWERS or name == "aten.pow":
            exponent = _POWERS[name] if name in _POWERS else node.args[1]
            if isinstance(node.args[0], fx.Node) and _number(exponent):
                yield from self._power(node.args[0], float(exponent))
        elif name == "aten.neg" and isinstance(node.args[0], fx.Node):
            yield from (form.times(-1) for form in self._forms(node.args[0]))
        elif name in VIEWS:
            yield from self._viewed(node)
        elif name in STRETCHES and isinstance(node.args[0], fx.Node):
            yield from self._forms(node.args[0])
        elif name in BOUNDS:
            yield from self._bounded(node)
        elif name in ("aten.linalg_vecdot", "aten.einsum"):
            yield from self._dotted(node)

    def _forms(self, node: Any) -> list[Form]:
        return self._of.get(node, []) if isinstance(node, fx.Node) else []

    def _linear(self, node: Any) -> Iterator[Linear]:
        """What has the channels of some x: linear forms, and the value as an x of its own."""
        yield from (form for form in self._forms(node) if isinstance(form, Linear) and form.a != 0)
        if isinstance(node, fx.Node):
            yield Linear(node, None, 1.0, 0.0)

    def _sum(self, node: fx.Node, sign: float) -> Iterator[Form]:
        first, second = node.args[:2]
        for number, other, kept in ((second, first, 1.0), (first, second, sign)):
            if _number(number):
                added = sign * float(number) if kept == 1 else float(number)
                forms = (form.times(kept) for form in self._forms(other) if isinstance(form, Statistic))
                yield from (replace(form, eps=form.eps + added) for form in forms if form.power == 1)
        for a in [*self._forms(first), *_itself(first)]:
            for b in [*self._forms(second), *_itself(second)]:
                if a.x is not b.x or (isinstance(a, Linear) and a.dim is None and b.dim is None):
                    continue
                if isinstance(a, Linear) and isinstance(b, Linear) and same_channels(a, b):
                    read = a.read or b.read or (node if None in (a.dim, b.dim) else None)
                    yield Linear(a.x, a.dim if b.dim is None else b.dim, a.a + sign * b.a, a.b + sign * b.b, read)
                if (
                    isinstance(a, Statistic)
                    and isinstance(b, Statistic)
                    and a.power == b.power == 1
                    and same_channels(a, b)
                ):
                    b = b.times(sign)
                    yield Statistic(a.x, a.dim, a.p + b.p, a.q + b.q, a.eps + b.eps)

    def _product(self, node: fx.Node) -> Iterator[Form | None]:
        for one, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if _number(other):
                yield from (form.times(float(other)) for form in self._forms(one))
            for a in self._forms(one):
                yield from (normalised(a, b) for b in self._forms(other) if isinstance(b, Statistic))
        if node.args[0] is node.args[1]:
            yield from self._power(node.args[0], 2.0)

    def _quotient(self, node: fx.Node) -> Iterator[Form | None]:
        one, other = node.args[:2]
        if _number(other) and other != 0:
            yield from (form.times(1 / float(other)) for form in self._forms(one))
        for b in self._forms(other):
            inverse = b.to_the(-1) if isinstance(b, Statistic) else None
            if inverse is not None and _number(one):
                yield inverse.times(float(one))
            elif inverse is not None:
                yield from (normalised(a, inverse) for a in self._forms(one))

    def _averaged(self, node: fx.Node, total: bool) -> Iterator[Form]:
        over = _over(node, 1, 2)
        if over is None or argument(node, 3, "dtype") not in (None, over[0].meta["val"].dtype):
            return
        value, dim, kept = over
        times = float(shape_of(value)[dim]) if total else 1.0
        for form in self._linear(value):
            if form.dim in (None, dim):
                yield Linear(form.x, dim, 0.0, (form.a + form.b) * times, squeezed=not kept)
        for square in self._forms(value):
            if isinstance(square, Square) and square.dim in (None, dim):
                yield replace(mean_square(square.base, dim, not kept).times(square.scale * times))

    def _spread(self, spread: fx.Node, mean: bool = False) -> Iterator[Form | None]:
        """A variance or deviation, or the mean that comes with it."""
        found = _spread_arguments(spread)
        if found is None:
            return
        value, dim, correction, kept = found
        size = float(shape_of(value)[dim])
        for form in self._linear(value):
            if form.dim not in (None, dim):
                continue
            if mean:
                yield Linear(form.x, dim, 0.0, form.a + form.b, squeezed=not kept)
            elif size > correction:
                p = form.a**2 * size / (size - correction)
                yield Statistic(form.x, dim, p, -p, squeezed=not kept).to_the(SPREADS[name_of(spread)])

    def _length(self, node: fx.Node) -> Iterator[Form | None]:
        over = _over(node, 2, 3)
        if over is None or argument(node, 1, "ord", 2) != 2 or node.kwargs.get("dtype") is not None:
            return
        value, dim, kept = over
        for form in self._linear(value):
            if form.dim in (None, dim):
                yield mean_square(form, dim, not kept).times(float(shape_of(value)[dim])).to_the(0.5)

    def _power(self, value: Any, exponent: float) -> Iterator[Form | None]:
        for form in self._forms(value):
            if isinstance(form, Statistic):
                yield form.to_the(exponent)
            elif isinstance(form, Linear) and exponent == 2 and form.a == 0 and form.dim is not None:
                yield Statistic(form.x, form.dim, 0.0, form.b**2, squeezed=form.squeezed)
        if exponent == 2:
            yield from (Square(form) for form in self._linear(value))

    def _viewed(self, node: fx.Node) -> Iterator[Form]:
        """What has no channels, with their dimension or without it: as a view keeps the order, its shape tells."""
        for form in self._forms(node.args[0]):
            if form.dim is None or isinstance(form, (Square, Normalised)) or (isinstance(form, Linear) and form.a != 0):
                continue
            whole, dim = tuple(shape_of(form.x)), form.dim
            shapes = {squeezed: (*whole[:dim], *([] if squeezed else [1]), *whole[dim + 1 :]) for squeezed in (0, 1)}
            if tuple(shape_of(node.args[0])) in shapes.values():
                yield from (replace(form, squeezed=bool(s)) for s, shape in shapes.items() if shape == shape_of(node))

    def _bounded(self, node: fx.Node) -> Iterator[Form]:
        """A variance is never below zero, whoever makes sure of that."""
        least = 0 if name_of(node) == "aten.relu" else argument(node, 1, "min")
        if argument(node, 2, "max") is None and _number(least):
            for form in self._forms(node.args[0]):
                if not isinstance(form, Statistic) or not form.centred or form.power != 1:
                    continue
                if form.p > 0 and least <= form.eps:
                    yield form

    def _dotted(self, node: fx.Node) -> Iterator[Form]:
        """The sum of the squares along a dimension, as a product of a value with itself."""
        found = _product_with_itself(node)
        if found is not None:
            value, dim = found
            size = float(shape_of(value)[dim])
            yield from (
                mean_square(form, dim, squeezed=True).times(size)
                for form in self._linear(value) if form.dim in (None, dim)
            )  # fmt: skip


BOUNDS = {"aten.clamp", "aten.clamp_min", "aten.relu"}
_POWERS = {"aten.square": 2.0, "aten.sqrt": 0.5, "aten.rsqrt": -0.5, "aten.reciprocal": -1.0}


def _itself(node: Any) -> list[Form]:
    return [Linear(node, None, 1.0, 0.0)] if isinstance(node, fx.Node) else []


def _plain(node: fx.Node) -> bool:
    """No ``alpha`` that multiplies the second operand, and no rounding."""
    return len(node.args) == 2 and all(key == "alpha" and value == 1 for key, value in node.kwargs.items())


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _over(node: fx.Node, dims_at: int, keep_at: int) -> tuple[fx.Node, int, bool] | None:
    """What is reduced, over which one dimension of a known size, and whether that dimension stays."""
    value = node.args[0]
    dims = argument(node, dims_at, "dim")
    if not isinstance(value, fx.Node) or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    dim = int(dims[0]) % max(len(shape_of(value)), 1)
    return (value, dim, bool(argument(node, keep_at, "keepdim", False))) if _sized(value, dim) else None


def _product_with_itself(node: fx.Node) -> tuple[fx.Node, int] | None:
    """What is multiplied with itself and summed over one dimension, which goes, and that dimension."""
    equation, operands, dim = "", node.args[:2], argument(node, 2, "dim", -1)
    if name_of(node) == "aten.einsum":
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]  # type: ignore[assignment]
    if len(operands) != 2 or operands[0] is not operands[1] or not isinstance(operands[0], fx.Node):
        return None
    value, rank = operands[0], len(shape_of(operands[0]))
    if equation:
        first, second, after = (*equation.replace("->", ",").split(","), "", "")[:3]
        gone = [i for i, letter in enumerate(first) if letter not in after]
        plain = len(set(first)) == len(first) == rank and first.isalpha() and len(gone) == 1
        if not plain or second != first or "".join(c for c in first if c in after) != after:
            return None
        dim = gone[0]
    dim = int(dim) % max(rank, 1)
    return (value, dim) if _sized(value, dim) else None


def _sized(value: fx.Node, dim: int) -> bool:
    shape = shape_of(value)
    return len(shape) > dim and type(shape[dim]) is int and shape[dim] > 0


def _spread_arguments(node: fx.Node) -> tuple[fx.Node, int, float, bool] | None:
    """What a variance is of: value, dimension, correction, whether the dimension stays."""
    value, dims = node.args[0], argument(node, 1, "dim")
    if not isinstance(value, fx.Node) or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    dim = int(dims[0]) % max(len(shape_of(value)), 1)
    if str(node.target).endswith(".correction"):
        correction: Any = node.kwargs.get("correction")
        corrected, kept = 1.0 if correction is None else correction, bool(node.kwargs.get("keepdim", False))
    elif str(node.target).endswith(".dim"):
        corrected, kept = float(bool(argument(node, 2, "unbiased", True))), bool(argument(node, 3, "keepdim", False))
    else:
        return None
    if not _number(corrected) or corrected < 0 or not _sized(value, dim):
        return None
    return value, dim, float(corrected), kept


def _spread_over(node: fx.Node) -> tuple[fx.Node, int] | None:
    found = _spread_arguments(node)
    return found[:2] if found is not None else None
