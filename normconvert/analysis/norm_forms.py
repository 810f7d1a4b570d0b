"""What a value may be, of a value x and one of its dimensions: the terms in which a LayerNorm written by hand is found.

See :mod:`normconvert.analysis.handwritten`; m = mean(x), v = mean((x - m)^2), d channels, P = I - 11'/d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import fx

from normconvert.analysis.channel_axes import shape_of

CLOSE = 1e-12
"""Of a number made of sizes, such as d * (1 / d)."""


@dataclass(frozen=True)
class Linear:
    """a x + b m; ``read`` is the node that takes x itself, None for a multiple of m."""

    x: fx.Node
    dim: int | None
    a: float
    b: float
    read: fx.Node | None = None
    squeezed: bool = False  # m without its dimension

    @property
    def centred(self) -> bool:
        """Whether it is a Px."""
        return self.a != 0 and abs(self.a + self.b) <= CLOSE * abs(self.a)

    def times(self, number: float) -> Linear:
        """The form of a multiple."""
        return replace(self, a=self.a * number, b=self.b * number)


@dataclass(frozen=True)
class Square:
    """The square of a linear form, channel by channel."""

    base: Linear
    scale: float = 1.0
    squeezed: bool = False

    @property
    def x(self) -> fx.Node:
        """The value it is of."""
        return self.base.x

    @property
    def dim(self) -> int | None:
        """Where that has the channels, as far as it is known."""
        return self.base.dim

    @property
    def centred(self) -> bool:
        """Whether it is one of Px."""
        return self.base.centred

    def times(self, number: float) -> Square:
        """The form of a multiple."""
        return replace(self, scale=self.scale * number)


@dataclass(frozen=True)
class Statistic:
    """scale * (p mean(x^2) + q m^2 + eps)^power."""

    x: fx.Node
    dim: int
    p: float
    q: float
    eps: float = 0.0
    power: float = 1.0
    scale: float = 1.0
    squeezed: bool = False

    @property
    def centred(self) -> bool:
        """Whether it is one of the variance alone."""
        return abs(self.p + self.q) <= CLOSE * abs(self.p)

    def times(self, number: float) -> Statistic:
        """The form of a multiple."""
        if self.power != 1:
            return replace(self, scale=self.scale * number)
        return replace(self, p=self.p * number, q=self.q * number, eps=self.eps * number)

    def to_the(self, power: float) -> Statistic | None:
        """A power of it; None where that is none of these."""
        new = self.power * power
        if new not in (1, 0.5, -0.5, -1) or self.scale <= 0:
            return None
        made = replace(self, power=new, scale=1.0)
        return made.times(self.scale**power)


@dataclass(frozen=True)
class Normalised:
    """k Px / sqrt(v + eps)."""

    x: fx.Node
    dim: int
    k: float
    eps: float
    read: fx.Node
    squeezed: bool = False

    @property
    def centred(self) -> bool:
        """It is, always."""
        return True

    def times(self, number: float) -> Normalised:
        """The form of a multiple."""
        return replace(self, k=self.k * number)


Form = Linear | Square | Statistic | Normalised


def same_channels(a: Linear | Statistic, b: Linear | Statistic) -> bool:
    """Whether two forms are of the same channels; a sum of squeezed ones is a squeezed one, which nobody needs."""
    return (a.dim is None or b.dim is None or a.dim == b.dim) and not (a.squeezed or b.squeezed)


def mean_square(form: Linear, dim: int, squeezed: bool) -> Statistic:
    """mean((a x + b m)^2) = a^2 mean(x^2) + (2 a b + b^2) m^2."""
    return Statistic(form.x, dim, form.a**2, 2 * form.a * form.b + form.b**2, squeezed=squeezed)


def normalised(top: Form, factor: Statistic) -> Normalised | None:
    """a Px s (p v + e)^(-1/2) = (a s / sqrt(p)) Px / sqrt(v + e / p)."""
    if not (isinstance(top, Linear) and top.centred and top.read is not None and factor.centred):
        return None
    if factor.squeezed:  # broadcast along another dimension
        return None
    # Both halves must be of the same x over the same axis: otherwise this is a quotient of two values.
    if top.x is not factor.x or top.dim != factor.dim or factor.power != -0.5 or factor.p <= 0 or factor.eps < 0:
        return None
    k = top.a * factor.scale / math.sqrt(factor.p)
    return Normalised(top.x, factor.dim, k, factor.eps / factor.p, top.read)


def fits(form: Form, node: fx.Node) -> bool:
    """Whether the value has the shape that its form has: broadcasting may have made something else of it."""
    whole, shape = tuple(shape_of(form.x)), tuple(shape_of(node))
    if isinstance(form, Statistic) or (isinstance(form, Linear) and form.a == 0):
        assert form.dim is not None
        one = () if form.squeezed else (1,)
        narrow = (*whole[: form.dim], *one, *whole[form.dim + 1 :])
        return shape == narrow or (shape == whole and not form.squeezed)
    return shape == whole and not form.squeezed
