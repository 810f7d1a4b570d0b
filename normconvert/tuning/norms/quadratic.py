"""What UN and PowerNorm share: y = γ∘x/√(s + ε) + β, with s a stored mean of squares, channel by channel.

Neither subtracts a mean, whatever norm it replaces: an RMSNorm's x/√(⟨x²⟩ + ε) has the mean over channels where this
has it over tokens, and β, which an RMSNorm lacks, begins as the fit to calibration data says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normconvert.tuning.norms.tokens import Moments, along


def normalised(x: Tensor, weight: Tensor, bias: Tensor, square: Tensor, *, eps: float, axis: int) -> Tensor:
    """The norm in eval mode.

    Args:
        x: any shape with the channels at ``axis``.
        weight: γ, ``[channels]``.
        bias: β, likewise.
        square: s, likewise.
        eps: ε.
        axis: of the channels.

    Returns:
        Shape and dtype of ``x``.
    """
    # As one factor by channel, not x·rsqrt(…)·γ: in eval mode the norm is to be the affine map that it ends as.
    scale = weight * torch.rsqrt(square + eps)
    return x * along(scale, x, axis).to(x.dtype) + along(bias, x, axis).to(x.dtype)


def start_from(moments: Moments, weight: Tensor, bias: Tensor, square: Tensor, *, eps: float) -> None:
    """Fill s with the calibration data's, and γ and β with those that are closest to the norm replaced.

    Args:
        moments: of the norm replaced.
        weight: γ, ``[channels]``, changed in place.
        bias: β, likewise.
        square: s, likewise.
        eps: ε.
    """
    a, b = moments.fit()
    with torch.no_grad():
        square.copy_(moments.square)
        weight.copy_(a * (moments.square + eps).sqrt())
        bias.copy_(b)


def affine_of(weight: Tensor, bias: Tensor, square: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(a, b) of y = a∘x + b, in float64: γ/√(s + ε) and β, ``[channels]``."""
    wide = square.detach().double()
    return weight.detach().double() * (wide + eps).rsqrt(), bias.detach().double()
