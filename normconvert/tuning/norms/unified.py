"""Unified Normalization (arXiv 2208.01313; the authors' code: hikvision-research/Unified-Normalization).

    y = γ∘z + β,   z = x / √(σ̂² + ε)

σ² is the mean of squares over all tokens, channel by channel: no mean is subtracted, and none over channels is taken.
Activation statistics fluctuate from batch to batch in transformers, so both passes use smoothed ones (section 3.2):

    forward    σ̂²_t = (Π σ²_{t-M+1..t})^(1/M)            the geometric mean of the last M batches
    backward   ψ_t   = mean of ⟨g∘z⟩ over the last M batches, ψ̂_t = α ψ̂_{t-1} + (1-α) ψ_t,   g = γ∘∂L/∂y
               ∂L/∂x = (g - ψ̂_t∘z) / √(σ̂² + ε)
    inference  σ²_run ← α σ²_run + (1-α) σ̂²_t            α = 0.9

with ⟨·⟩ the mean over tokens. Warm-up uses plain batch statistics. Adaptive outlier filtration (section 3.3): where the
window's arithmetic mean exceeds its geometric mean by more than M times the variance of the recorded √σ², in any
channel, the batch is an outlier: it is normalised by its own statistics, with the exact gradient, and leaves the
running values in the window.

The published code passes on a factor r = √(σ̂²+ε)/√(σ²_run+ε) ∈ [1/5, 5] to g and ∂L/∂γ once warm-up and 1,000 batches
are over; so does this. It means over padded tokens in the backward pass, too; here they count in neither, which is
what makes the gradient exact where no smoothing is at work. And there σ²_run takes an outlier's own σ², undamped,
though filtration is to keep outliers out: with a wild example in every fourth batch that spoils inference. Here it
takes the window's geometric mean, as it does without filtration; it cannot ignore the batch, or filtered batches would
keep σ²_run, and with it the window, from following activations that really have moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tuning.norms.quadratic import affine_of, normalised, start_from
from normconvert.tuning.norms.tokens import Moments, count, mean, rows, summed, unrows, weights_of

RATIO = 5.0
"""Largest r, and 1/r, that the backward pass corrects by."""


class UnifiedNorm(nn.Module):
    """See the module's text. In eval mode y = x * (weight * rsqrt(running_var + eps)) + bias.

    Args:
        size: number of channels.
        eps: added to the mean square.
        axis: of the channels in the input.
        window: M, the number of batches whose statistics are smoothed; 1: no smoothing, exact gradients.
        momentum: α.
        warmup: so many batches use plain statistics.
        filtration: leave outlier batches out.
        ratio_after: r is 1 up to this batch.
    """

    running_var: Tensor
    window_x2: Tensor
    window_gz: Tensor
    smooth_gz: Tensor
    steps: Tensor
    skipped: Tensor

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        axis: int = -1,
        window: int = 4,
        momentum: float = 0.9,
        warmup: int = 4000,
        filtration: bool = True,
        ratio_after: int = 1000,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.axis = size, eps, axis
        self.window, self.momentum, self.warmup = window, momentum, warmup
        self.filtration, self.ratio_after = filtration, ratio_after
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.register_buffer("window_x2", torch.zeros(window, size))
        self.register_buffer("window_gz", torch.zeros(window, size))
        self.register_buffer("smooth_gz", torch.zeros(size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.valid: Tensor | None = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.size}, eps={self.eps}, window={self.window}, filtration={self.filtration}"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, any shape with ``size`` channels at ``axis``; same shape and dtype out."""
        if not self.training:
            return normalised(input, self.weight, self.bias, self.running_var, eps=self.eps, axis=self.axis)
        x, weight = rows(input, self.axis), weights_of(self.valid, input, self.axis)
        n = count(x.detach(), weight)
        with torch.no_grad():
            var, ratio, skip = self._statistics(mean(x.detach().square(), weight, n))
        return unrows(_Unified.apply(x, self.weight, self.bias, var, ratio, skip, weight, n, self), input, self.axis)

    def _statistics(self, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Record one batch; returns σ̂², r and whether smoothing is skipped. No value leaves the device."""
        self.steps += 1
        step, window = self.steps, self.window_x2
        slot = (step % self.window).reshape(1)
        # Before this batch is recorded: an outlier would raise the variance that it is judged by.
        recorded = window.sqrt().var() if window.numel() > 1 else window.new_zeros(())
        window.index_copy_(0, slot, x2[None])
        geometric = window.log().mean(0).exp()
        skip = torch.full((), self.window < 2, dtype=torch.bool, device=x2.device)
        outlier = torch.zeros_like(skip)
        if self.filtration:
            outlier = ((window.mean(0) - geometric) > recorded * self.window).any() & (step >= self.warmup)
            window.index_copy_(0, slot, torch.where(outlier, self.running_var, x2)[None])
            self.skipped += outlier
            skip = skip | outlier
        early = (step <= self.window) | (step < self.warmup)
        var = torch.where(skip | early, x2, geometric)
        ratio = ((var + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / RATIO, RATIO)
        ratio = torch.where(skip | (step <= max(self.ratio_after, self.warmup)), torch.ones_like(ratio), ratio)
        # Not an outlier's own σ², as in the published code: see the module's text for what that does to inference.
        lasting = torch.where(outlier & ~early, geometric, var)
        self.running_var.copy_(self.momentum * self.running_var + (1 - self.momentum) * lasting)
        return var, ratio, skip

    def smooth(self, gz: Tensor, skip: Tensor) -> Tensor:
        """Record ⟨g∘z⟩ of one batch; returns ψ̂, or ⟨g∘z⟩ itself where smoothing is skipped."""
        step = self.steps
        slot = (step % self.window).reshape(1)
        self.window_gz.index_copy_(0, slot, torch.where(skip, self.smooth_gz, gz)[None])
        plain = skip | (step <= self.window) | (step < self.warmup)
        smoothed = torch.where(plain, gz, self.window_gz.mean(0))
        self.smooth_gz.copy_(self.momentum * self.smooth_gz + (1 - self.momentum) * smoothed)
        return torch.where(skip, smoothed, self.smooth_gz)

    def calibrate(self, moments: Moments) -> None:
        """Start from the statistics of calibration data, with the γ and β that are closest to the norm replaced."""
        start_from(moments, self.weight, self.bias, self.running_var, eps=self.eps)
        # With zeros in the window its geometric mean is zero, and the first batches after a short warm-up are outliers.
        self.window_x2.copy_(moments.square.expand_as(self.window_x2))

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b) in float64: in eval mode this norm is a∘x + b."""
        return affine_of(self.weight, self.bias, self.running_var, eps=self.eps)


class _Unified(torch.autograd.Function):
    """y = γ∘x/√(σ̂²+ε) + β on (tokens, channels), with the smoothed gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        var: Tensor,
        ratio: Tensor,
        skip: Tensor,
        valid: Tensor | None,
        n: Tensor,
        norm: UnifiedNorm,
    ) -> Tensor:
        root = (var + norm.eps).rsqrt()
        z = x * root
        ctx.save_for_backward(z, weight, root, ratio, skip, valid, n)
        ctx.norm = norm
        return z * weight + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, root, ratio, skip, valid, n = ctx.saved_tensors
        grad = grads[0]
        g = grad * weight * ratio
        gz = summed((g * z).sum(0)) / n  # every token's output depends on σ̂², a padded one's, too
        psi = ctx.norm.smooth(gz, skip)
        pull = psi * z if valid is None else psi * z * valid  # but σ̂² does not depend on a padded one
        return (g - pull) * root, (grad * z * ratio).sum(0), grad.sum(0), *[None] * 6
