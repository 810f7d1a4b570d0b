"""Orthogonal maps of the channels, by a name, a seed and a width: what a plan says of them, and no matrix.

- ``hadamard``: H diag(s) with random signs s and H the Kronecker product of small orthogonal matrices: Sylvester's
  of order 2^k, times one of Paley's (q a prime: q + 1 for q = 3 mod 4, 2 (q + 1) for q = 1 mod 4), all numbers of one
  size; a width that has neither takes a random orthogonal matrix in its place, of the smallest order that is left.
- ``random``: a random orthogonal matrix.
- ``sha256:...``: a matrix that the user gave in a file: see `normconvert.plan.given_rotations`.

With ``constant`` the map leaves what is the same in all channels as it is, Q 1 = 1, and so commutes with the mean.
Every factor of H has a constant first column, H e = u with e the first axis and u = 1 / sqrt(n) throughout; so
Q = H diag(1, s) R with R the reflection that exchanges u and e. R changes the first channel, and adds one number to all
others: but for its first column Q is H diag(1, s) up to some 5 / n in each number, so it spreads a channel as well.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from normconvert.options import ROTATIONS
from normconvert.plan.given_rotations import KIND, matrix_of, nearest_orthogonal

LARGEST = 16
"""Order of a factor of Sylvester's matrix: larger ones multiply more, smaller ones go through memory more often."""

SLICE = 1 << 17
"""Numbers that all factors are applied to at a time: between two of them they stay in the cache."""


def rotated(x: Tensor, dim: int, kind: str, seed: int, constant: bool) -> Tensor:
    """Q x along dimension ``dim``, in float64.

    Args:
        x: in float64, and may be overwritten; on the meta device it is returned.
        dim: the channels.
        kind: one of :data:`normconvert.options.ROTATIONS`, or of a file.
        seed: of the signs and random matrices.
        constant: Q 1 = 1.

    Raises:
        KeyError: there is no such kind.
        InputError: the file was not read.
    """
    if kind not in ROTATIONS and not kind.startswith(KIND):
        raise KeyError(kind)
    if x.device.type == "meta":
        return x
    shape, size = x.shape, x.shape[dim]
    view = x.reshape(math.prod(shape[:dim]), size, math.prod(shape[dim + 1 :]))
    if kind == "hadamard":
        signs, factors = _signs(size, seed, constant).to(x.device)[:, None], _factors(size, seed)
    else:
        signs, factors = None, (_random(size, seed, constant) if kind == "random" else _given(kind, constant),)
    factors = tuple(factor.to(x.device) for factor in factors)
    for part in _parts(view, max(map(len, factors), default=1)):
        if signs is not None:
            if constant:
                _reflect(part)
            part.mul_(signs)
        part.copy_(_product(part, factors))
    return view.reshape(shape)


def order_without_hadamard(size: int) -> int:
    """The order of the random factor of ``hadamard`` at this width; 1 if there is a Hadamard matrix of this width."""
    _, order, paley = _split(size)
    return 1 if paley else order


def _parts(x: Tensor, largest: int) -> Iterator[Tensor]:
    """Views of what lies before and behind the channels, small enough for the cache; ``largest``: order of a factor."""
    before, size, after = x.shape
    # A large factor is read once for every part: not for a few columns.
    columns = max(SLICE // size, largest, 1)
    rows = max(columns // max(after, 1), 1)
    for row in range(0, before, rows):
        for column in range(0, after, columns):
            # Not of split(), whose parts may not be overwritten where gradients are on.
            yield x[row : row + rows, :, column : column + columns]


def _product(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """(F1 x F2 x ...) x along the middle one of three dimensions, x the Kronecker product.

    A product is quick where the axis of its factor comes first, or what lies behind it is long. So each factor is
    multiplied where its axis lies, but not in rows of channels, whose last axes have nothing behind them: there each
    product brings the last axis that is left to the front, and the first factor's, the last to be multiplied, finds
    the others in order before the rows: row by row it puts them behind its own.
    """
    before, size, after = x.shape
    if after == 1 and factors:
        for factor in reversed(factors[1:]):
            x = factor @ x.reshape(-1, len(factor)).T
        order = len(factors[0])
        others = x.reshape(size // order, before, order).permute(1, 2, 0)
        return torch.bmm(factors[0].expand(before, order, order), others).reshape(before, size, 1)
    groups, left = before, size
    for factor in factors:
        order = len(factor)
        left //= order
        if groups == 1:
            x = factor @ x.reshape(order, left * after)
        else:
            x = torch.bmm(factor.expand(groups, order, order), x.reshape(groups, order, left * after))
        groups *= order
    return x.reshape(before, size, after)


def _reflect(x: Tensor) -> None:
    """R x along the middle one of three dimensions, in place: R exchanges the first axis and 1 / sqrt(n)."""
    size = x.shape[1]
    if size == 1:
        return
    # R = 1 - 2 v v' / v'v with v = e - u, and v'v = 2 (1 - 1 / sqrt(n)).
    along = (x.narrow(1, 0, 1) - x.sum(1, keepdim=True) * size**-0.5) / (1.0 - size**-0.5)
    x.add_(along * size**-0.5)
    x.narrow(1, 0, 1).sub_(along)


@functools.lru_cache(maxsize=16)
def _factors(size: int, seed: int) -> tuple[Tensor, ...]:
    """Orthogonal matrices, each with a constant first column, whose Kronecker product has the order ``size``."""
    power, order, paley = _split(size)
    found: list[Tensor] = []
    while power > 1:
        found.insert(0, _sylvester(min(power, LARGEST)))
        power //= len(found[0])
    if order > 1:
        found.append(_paley(order) if paley else _first_column_constant(order, seed))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _split(size: int) -> tuple[int, int, bool]:
    """``size`` as a power of two and the order of one more factor, and whether Paley's construction has that order."""
    power = size & -size
    order = size // power
    if order == 1:
        return power, 1, True
    left = power
    while left >= 1:
        # The smallest first: its matrix is the one that is not applied in parts.
        if _paley_prime(size // left):
            return left, size // left, True
        left //= 2
    return power, order, False


def _paley_prime(order: int) -> tuple[int, int] | None:
    """The prime q and the kind of the construction, 1 or 2, that gives a Hadamard matrix of this order."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        return order - 1, 1
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return order // 2 - 1, 2
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / order**0.5


def _paley(order: int) -> Tensor:
    """Paley's matrix (1933) with its first column made constant."""
    found = _paley_prime(order)
    assert found is not None
    q, kind = found
    squares = {k * k % q for k in range(1, q)}
    residues = torch.tensor([0.0, *(1.0 if k in squares else -1.0 for k in range(1, q))], dtype=torch.float64)
    index = torch.arange(q)
    jacobsthal = residues[(index[:, None] - index) % q]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1.0
    conference[1:, 0] = -1.0 if kind == 1 else 1.0
    conference[1:, 1:] = jacobsthal
    one = torch.eye(q + 1, dtype=torch.float64)
    if kind == 1:
        matrix = conference + one
    else:
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(conference, plus) + torch.kron(one, minus)
    return matrix * matrix[:, :1] / order**0.5


def _householder(order: int) -> Tensor:
    """The reflection that exchanges the first axis and 1/sqrt(order); its first column is constant."""
    axis = torch.full((order,), order**-0.5, dtype=torch.float64)
    normal = -axis
    normal[0] += 1.0
    length = float(normal @ normal)
    one = torch.eye(order, dtype=torch.float64)
    return one - 2.0 * torch.outer(normal, normal) / length if length > 0 else one


def _first_column_constant(order: int, seed: int) -> Tensor:
    """A random orthogonal matrix whose first column is constant."""
    inner = torch.eye(order, dtype=torch.float64)
    inner[1:, 1:] = _orthogonal(order - 1, seed)
    return _householder(order) @ inner


@functools.lru_cache(maxsize=4)
def _random(size: int, seed: int, constant: bool) -> Tensor:
    if not constant:
        return _orthogonal(size, seed)
    outer, inner = _householder(size), torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _orthogonal(size - 1, seed)
    return outer @ inner @ outer.T


@functools.lru_cache(maxsize=4)
def _given(kind: str, constant: bool) -> Tensor:
    """The orthogonal matrix nearest to the one that was read; of those with Q 1 = 1 if ``constant``."""
    matrix = matrix_of(kind)
    if not constant:
        return nearest_orthogonal(matrix)
    outer, inner = _householder(len(matrix)), torch.eye(len(matrix), dtype=torch.float64)
    inner[1:, 1:] = nearest_orthogonal((outer.T @ matrix @ outer)[1:, 1:])
    return outer @ inner @ outer.T


def _orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, uniform: the signs of R's diagonal belong to Q (Mezzadri, 2007)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@functools.lru_cache(maxsize=16)
def _signs(size: int, seed: int, constant: bool) -> Tensor:
    """Random signs; with ``constant`` the first is plus."""
    drawn = hashlib.shake_256(f"{seed} {size}".encode()).digest(size)
    signs = torch.tensor([1.0 if byte & 1 else -1.0 for byte in drawn], dtype=torch.float64)
    if constant:
        signs[0] = 1.0
    return signs
