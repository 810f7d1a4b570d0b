"""Two maps that take a mean-free vector to one number less and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normconvert.runtime.kernels import wide_dtype

BASES: dict[str, Callable[[int], tuple[float, float, float, float, float]]] = {
    "paper": lambda d: (1.0, 1.0 / d, 0.0, 0.0, 1.0),
    "isometric": lambda d: (
        (1.0 - 1.0 / d) ** 0.5, 1.0 / (d + d**0.5), 1.0 / (1.0 + d**0.5), 1.0 / (d + d**0.5), d**-0.5
    ),
}  # fmt: skip
"""Bases of the mean-free vectors of size d: the numbers (s, a, b, c, e) of two maps B and L with L B = I - 11'/d,

    (B x)_i = s (x_i - a sum(x) - b x_d)    and    (L y)_i = (y_i - c sum(y)) / s,  (L y)_d = -e sum(y) / s,    i < d.

``paper`` drops the last channel (arXiv 2305.14858, section 3). In ``isometric`` the rows of B are those of the
Householder reflection that takes 1/sqrt(d) to the last axis, without its last row: orthogonal to each other and to 1.
Their length s makes the norm over d a plain RMSNorm over d - 1 numbers: |B x|^2 / (d - 1) = |P x|^2 / d.
"""


def compress(x: Tensor, axis: int, basis: str) -> Tensor:
    """B x along ``axis``, one channel less; rounded to the dtype of x once. See :data:`BASES`."""
    size = x.shape[axis]
    scale, mean, last, _, _ = BASES[basis](size)
    wide = x.to(wide_dtype(x))
    shift = wide.sum(axis, keepdim=True) * mean
    if last:
        shift = shift + wide.narrow(axis, size - 1, 1) * last
    return ((wide.narrow(axis, 0, size - 1) - shift) * scale).to(x.dtype)


def lift(y: Tensor, axis: int, basis: str) -> Tensor:
    """L y along ``axis``, the mean-free vectors with one channel more, in the dtype to accumulate in."""
    scale, _, _, head, last = BASES[basis](y.shape[axis] + 1)
    wide = y.to(wide_dtype(y))
    total = wide.sum(axis, keepdim=True)
    if scale == 1.0 and head == 0.0:
        return torch.cat([wide, total * -last], axis)
    return torch.cat([wide - total * head, total * -last], axis) * (1.0 / scale)
