"""RepBN and its progressive form PRepBN (SLAB, arXiv 2405.11582; the authors' code: xinghaochen/SLAB).

    RepBN(x) = BN(x) + η x                                  (eq. 4; η a learnt number)
    y = λ LN(x) + (1-λ) RepBN(x),   λ: 1 -> 0               (eq. 2 and 3; λ falls over the steps of the schedule)

BN normalises each channel over all tokens of the batch, with running statistics (momentum 0.1) in eval mode, where
RepBN is one affine map per channel: a = γ/√(var+ε) + η, b = β - γ mean/√(var+ε) (eq. 5). LN and BN have parameters of
their own.

In place of an RMSNorm the first term is that norm, and RepBN stays what it is: BN subtracts each channel's mean over
tokens, which an RMSNorm does not, and has a bias, which an RMSNorm lacks. The paper trains LLaMA-350M, an RMSNorm
model, with RepBN and names no other form of it. What is left, a∘x + b, expresses either; which one is learnt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconvert.tuning.norms.tokens import Moments, along, count, mean, rows, unrows, weights_of


class RepBatchNorm(nn.Module):
    """See the module's text. With λ = 0, in eval mode, y = x * (weight * rsqrt(running_var + eps) + eta) + shift.

    Args:
        size: number of channels.
        eps: added to both variances.
        axis: of the channels in the input.
        momentum: of the running statistics.
        centred: the norm replaced subtracts the token's mean (LayerNorm); False: RMSNorm.
    """

    running_mean: Tensor
    running_var: Tensor
    mix: Tensor

    def __init__(
        self, size: int, eps: float = 1e-5, *, axis: int = -1, momentum: float = 0.1, centred: bool = True
    ) -> None:
        super().__init__()
        self.size, self.eps, self.axis, self.momentum, self.centred = size, eps, axis, momentum, centred
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eta = nn.Parameter(torch.ones(()))
        self.old_weight = nn.Parameter(torch.ones(size))
        self.old_bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.register_buffer("mix", torch.ones(()))
        self.valid: Tensor | None = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.size}, eps={self.eps}"

    @property
    def blending(self) -> bool:
        """Whether λ > 0: some of the old norm is left."""
        return bool(self.mix > 0)

    def forward(self, input: Tensor) -> Tensor:
        """λ LN(x) + (1-λ) RepBN(x); ``input`` has ``size`` channels at ``axis``; same shape and dtype out."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
            y = input * along(scale + self.eta, input, self.axis).to(input.dtype) + along(shift, input, self.axis).to(
                input.dtype
            )
            if self.blending:
                old = unrows(self._old(rows(input, self.axis)), input, self.axis)
                y = self.mix.to(y.dtype) * old + (1 - self.mix).to(y.dtype) * y
            return y
        x, weight = rows(input, self.axis), weights_of(self.valid, input, self.axis)
        n = count(x.detach(), weight)
        centre = mean(x, weight, n)
        var = mean((x - centre).square(), weight, n)
        with torch.no_grad():
            self.running_mean.lerp_(centre.to(self.running_mean.dtype), self.momentum)
            # As torch's BatchNorm: the biased variance divides, the unbiased one is remembered.
            unbiased = var * (n / (n - 1).clamp_min(1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        y = (x - centre) * torch.rsqrt(var + self.eps) * self.weight + self.bias + self.eta * x
        if self.blending:
            y = self.mix * self._old(x) + (1 - self.mix) * y
        return unrows(y, input, self.axis)

    def _old(self, x: Tensor) -> Tensor:
        """The norm replaced, on (tokens, channels)."""
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        z = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return z * self.old_weight + self.old_bias

    def set_mix(self, value: float) -> None:
        """Set λ."""
        self.mix.fill_(value)

    def calibrate(self, moments: Moments) -> None:
        """Start from the statistics of calibration data and the affine map that is closest to the norm replaced.

        η takes what all channels have in common of it, BN the rest.
        """
        a, b = moments.fit()
        eta = a.mean()
        with torch.no_grad():
            self.running_mean.copy_(moments.mean)
            self.running_var.copy_(moments.variance)
            self.eta.copy_(eta)
            self.weight.copy_((a - eta) * (moments.variance + self.eps).sqrt())
            # BN takes its mean away before it scales: what the map loses by that is given back here.
            self.bias.copy_(b + (a - eta) * moments.mean)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b) in float64: with λ = 0 this norm is a∘x + b in eval mode."""
        scale = self.weight.detach().double() * (self.running_var.detach().double() + self.eps).rsqrt()
        shift = self.bias.detach().double() - self.running_mean.detach().double() * scale
        return scale + self.eta.detach().double(), shift
