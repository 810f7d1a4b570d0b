"""What the training norms share: tokens as rows, sums over the tokens of all processes, the fit of an affine map.

A *token* is one vector of channels: one position of one sequence, one pixel of one image. Padded ones do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def rows(x: Tensor, axis: int) -> Tensor:
    """``x`` with its channels last, as (tokens, channels), in float32 or float64."""
    moved = x if axis in (-1, x.ndim - 1) else x.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1]).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def unrows(y: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of :func:`rows`: shape and dtype of ``like``."""
    if axis in (-1, like.ndim - 1):
        return y.reshape(like.shape).to(like.dtype)
    moved = like.movedim(axis, -1).shape
    return y.reshape(moved).movedim(-1, axis).to(like.dtype)


def weights_of(valid: Tensor | None, x: Tensor, axis: int) -> Tensor | None:
    """1 for a token that counts, 0 for padding, as (tokens, 1); None if all count or the mask is of something else.

    A mask (batch, positions) is that of (batch, positions, heads) and (batch, heads, positions), too: a norm of queries
    or keys sees each token once a head.
    """
    if valid is None:
        return None
    shape = list(x.shape)
    del shape[axis]
    if len(shape) == 3 and valid.ndim == 2 and shape[0] == valid.shape[0]:
        positions = [dim for dim in (1, 2) if shape[dim] == valid.shape[1]]
        if len(positions) == 1:  # as many heads as positions: nobody can tell
            valid = valid.unsqueeze(3 - positions[0]).expand(shape)
    if list(valid.shape) != shape:
        return None
    return valid.reshape(-1, 1).to(device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    """A vector of channels, shaped to broadcast along ``axis`` of ``x``."""
    trailing = x.ndim - 1 - axis % x.ndim
    return vector.reshape(-1, *[1] * trailing) if trailing else vector


def summed(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes; of one process ``x`` itself."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    result: Tensor = _Summed.apply(x)
    return result


class _Summed(torch.autograd.Function):
    """s = x_1 + ... + x_W; since each process's loss sees s, the gradient of x_w is the sum of all gradients of s.

    Together with the averaging of parameter gradients over processes this is the gradient of the mean of the losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad


def count(x: Tensor, weight: Tensor | None) -> Tensor:
    """How many tokens count, over all processes; at least 1."""
    here = x.new_tensor(float(x.shape[0])) if weight is None else weight.sum().to(x.dtype)
    return summed(here).clamp_min(1)


def mean(x: Tensor, weight: Tensor | None, n: Tensor) -> Tensor:
    """The mean of (tokens, channels) over the tokens that count, of all processes."""
    return summed((x if weight is None else x * weight).sum(0)) / n


@dataclass
class Moments:
    """Sums over calibration tokens: of a norm's input x and of what the norm made of it, y; float64, by channel.

    Attributes:
        n: number of tokens.
        x, y, xx, xy, yy: sums of x, y, x², xy, y².
        deviation, first: sums over tokens of √(var(x) + ε), for all positions but the first and for the first.
        n_rest, n_first: their numbers of tokens.
    """

    n: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    deviation: float = 0.0
    first: float = 0.0
    n_rest: float = 0.0
    n_first: float = 0.0

    @property
    def mean(self) -> Tensor:
        """Mean of x by channel."""
        return self.x / self.n

    @property
    def square(self) -> Tensor:
        """Mean of x² by channel."""
        return self.xx / self.n

    @property
    def variance(self) -> Tensor:
        """Variance of x by channel (biased)."""
        # A difference of rounded sums: where all tokens are alike it may fall below zero.
        return (self.square - self.mean.square()).clamp_min(0)

    def fit(self) -> tuple[Tensor, Tensor]:
        """(a, b) of the least-squares fit y ≈ a∘x + b, channel by channel."""
        covariance = self.xy / self.n - self.mean * self.y / self.n
        variance = self.variance
        floor = 1e-12 * self.square + 1e-30  # a channel that never moves: the fit is its mean
        a = torch.where(variance > floor, covariance / variance.clamp_min(1e-30), torch.zeros_like(variance))
        return a, self.y / self.n - a * self.mean
