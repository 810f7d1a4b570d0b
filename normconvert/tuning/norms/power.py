"""PowerNorm (arXiv 2003.07845, algorithm 2; the authors' code: sIncerass/powernorm).

    y = γ∘x̂ + β,   x̂ = x / √(ψ²_{t-1} + ε),   ψ²_t = α ψ²_{t-1} + (1-α) ⟨x²⟩

with ⟨·⟩ the mean over tokens: the quadratic mean, no mean is subtracted. The divisor is the running one in training as
well, so the dependence of ψ on x is followed approximately, by a running estimate ν of its part in the gradient:

    x̃' = γ∘∂L/∂y - ν_{t-1}∘x̂,   ∂L/∂x = x̃' / √(ψ²_{t-1} + ε)
    ν_t = ν_{t-1}∘(1 - (1-α) ⟨x̂²⟩) + (1-α) ⟨γ∘∂L/∂y∘x̂⟩

Up to ``warmup`` batches x is divided by the batch's own quadratic mean, and ψ² takes the mean of all so far as well
(the authors' code). That code divides the gradient by the batch's quadratic mean even later; this follows the paper.

Group scaling (the authors' layer scale) divides by the quadratic mean of each of ``groups`` groups of channels first,
token by token. That part is no affine map: with it a norm cannot be fused completely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tuning.norms.quadratic import affine_of, normalised, start_from
from normconvert.tuning.norms.tokens import Moments, count, mean, rows, summed, unrows, weights_of


class PowerNorm(nn.Module):
    """See the module's text. In eval mode, without groups, y = x * (weight * rsqrt(running_phi + eps)) + bias.

    Args:
        size: number of channels.
        eps: added to the mean square.
        axis: of the channels in the input.
        forward_momentum: α of ψ².
        backward_momentum: α of ν.
        warmup: so many batches are divided by their own quadratic mean.
        groups: groups of the group scaling; 0: none.
    """

    running_phi: Tensor
    nu: Tensor
    steps: Tensor

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        axis: int = -1,
        forward_momentum: float = 0.9,
        backward_momentum: float = 0.9,
        warmup: int = 10_000,
        groups: int = 0,
    ) -> None:
        super().__init__()
        if groups and size % groups:
            raise ValueError(f"{groups} groups do not divide {size} channels")
        self.size, self.eps, self.axis, self.warmup, self.groups = size, eps, axis, warmup, groups
        self.forward_momentum, self.backward_momentum = forward_momentum, backward_momentum
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_phi", torch.ones(size))
        self.register_buffer("nu", torch.zeros(size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.valid: Tensor | None = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.size}, eps={self.eps}, groups={self.groups}"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, any shape with ``size`` channels at ``axis``; same shape and dtype out."""
        if self.groups:
            input = self.group_scaled(input)
        if not self.training:
            return normalised(input, self.weight, self.bias, self.running_phi, eps=self.eps, axis=self.axis)
        x, weight = rows(input, self.axis), weights_of(self.valid, input, self.axis)
        n = count(x.detach(), weight)
        with torch.no_grad():
            divisor = self._statistics(mean(x.detach().square(), weight, n))
        return unrows(_Power.apply(x, self.weight, self.bias, divisor, weight, n, self), input, self.axis)

    def group_scaled(self, input: Tensor) -> Tensor:
        """Each token divided by the quadratic mean of each group of its channels; differentiable."""
        moved = input.movedim(self.axis, -1)
        parts = moved.reshape(*moved.shape[:-1], self.groups, -1)
        scaled = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return scaled.reshape(moved.shape).movedim(-1, self.axis)

    def _statistics(self, x2: Tensor) -> Tensor:
        """Record one batch; returns what it is divided by."""
        self.steps += 1
        step, phi = self.steps, self.running_phi
        # ψ²_{t-1}: the divisor has to be read before this batch enters the running mean.
        divisor = torch.where(step <= self.warmup, x2, phi)
        phi.copy_(torch.where(step < self.warmup, phi * ((step - 1) / step) + x2 / step, phi))
        phi.copy_(self.forward_momentum * phi + (1 - self.forward_momentum) * x2)
        return divisor

    def calibrate(self, moments: Moments) -> None:
        """Start from the statistics of calibration data, with the γ and β that are closest to the norm replaced.

        The data has stood in for the warm-up: it is over.
        """
        start_from(moments, self.weight, self.bias, self.running_phi, eps=self.eps)
        self.steps.fill_(self.warmup)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b) in float64: in eval mode this norm is a∘x + b, of the group-scaled x if there are groups."""
        return affine_of(self.weight, self.bias, self.running_phi, eps=self.eps)


class _Power(torch.autograd.Function):
    """y = γ∘x/√(ψ²+ε) + β on (tokens, channels), with the approximate gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        divisor: Tensor,
        valid: Tensor | None,
        n: Tensor,
        norm: PowerNorm,
    ) -> Tensor:
        root = (divisor + norm.eps).rsqrt()
        z = x * root
        ctx.save_for_backward(z, weight, root, valid, n)
        ctx.norm = norm
        return z * weight + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, root, valid, n = ctx.saved_tensors
        norm, grad = ctx.norm, grads[0]
        g = grad * weight
        inside = z if valid is None else z * valid
        square = summed((inside * z).sum(0)) / n
        product = summed((g * z).sum(0)) / n
        pulled = (g - norm.nu * inside) * root
        # After `pulled`, which takes ν_{t-1}: with ν_t the batch would correct itself.
        rate = 1 - norm.backward_momentum
        norm.nu.copy_(norm.nu * (1 - rate * square) + rate * product)
        return pulled, (grad * z).sum(0), grad.sum(0), *[None] * 4
