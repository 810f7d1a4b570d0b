"""RMSNorm and CRMSNorm as modules: what stands where a converted norm stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.runtime.bases import BASES, lift
from normconvert.runtime.kernels import choose_kernel, wide_dtype


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset) + bias, the mean taken over one axis.

    The sum of squares is accumulated in float32 for 16-bit inputs, in the input's dtype otherwise; the result has the
    input's dtype and is rounded to it once, or before the bias as well where the device's own kernel is used. This
    covers norms that cast to float32 by themselves.

    Args:
        size: length of the normalised axis.
        eps: added to the mean square.
        axis: the normalised axis of the input; -1 for (..., size), -3 for images (batch, size, height, width).
        offset: added to the weight (1.0 where the checkpoint stores weight - 1).
        weight: shape (size,), or for axis -1 any shape that broadcasts against the input's last axes; None: ones.
        bias: like ``weight``; None: zeros.
        weight_name: name the weight is registered under.
        bias_name: name the bias is registered under.
        channels_last: for another axis than the last: in memory the result has that axis innermost, whatever the input,
            as that of a norm that permutes, calls layer_norm and permutes back.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        axis: int = -1,
        offset: float = 0.0,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        weight_name: str = "weight",
        bias_name: str = "bias",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = (size,)
        self.eps = self.variance_epsilon = eps
        self.axis, self.offset, self.channels_last = axis, offset, channels_last
        self.weight_name, self.bias_name = weight_name, bias_name
        self.register_parameter(weight_name, weight)
        self.register_parameter(bias_name, bias)
        self.elementwise_affine = weight is not None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shown = [str(self.normalized_shape[0]), f"eps={self.eps}"]
        shown += [f"axis={self.axis}"] if self.axis != -1 else []
        shown += [f"offset={self.offset}"] if self.offset else []
        shown += [f"weight={getattr(self, self.weight_name) is not None}"]
        shown += [f"bias={getattr(self, self.bias_name) is not None}"]
        return ", ".join(shown)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of any float dtype along ``axis``; same shape and dtype out."""
        x, axis = input, self.axis
        if self.channels_last:
            x, axis = x.movedim(axis, -1), -1
        elif axis == x.ndim - 1:
            axis = -1
        if axis == -1:
            x = x.contiguous()  # as layer_norm's result is, whatever its input: callers may view it
        weight, bias = self._vector(self.weight_name, axis, x), self._vector(self.bias_name, axis, x)
        if weight is not None and self.offset:
            weight = weight + self.offset
        y = choose_kernel(x, weight, bias, axis)(x, weight, bias, axis, self.eps)
        return y.movedim(-1, self.axis) if self.channels_last else y

    def _vector(self, name: str, axis: int, x: Tensor) -> Tensor | None:
        """The weight or bias, shaped to broadcast along the normalised axis of x."""
        value: Tensor | None = getattr(self, name)
        if axis == -1 or value is None or value.ndim != 1:
            return value
        return value.reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))


class CRMSNorm(RMSNorm):
    """The norm of a mean-free vector of ``size`` channels that is given by ``size`` - 1 numbers, B x.

    Folded, it gives such numbers again, B x / sqrt(|P x|^2 / size + eps), and its weight and bias have moved into the
    linear maps that read it. With ``expand`` it gives all channels, weight and bias applied, for readers that need
    them: what it is in place of did the same.

    Args:
        size: channels of the original norm.
        eps: as there.
        basis: one of :data:`BASES`.
        expand: give ``size`` channels.
        options: as for :class:`RMSNorm`.
    """

    def __init__(
        self, size: int, eps: float = 1e-5, *, basis: str = "isometric", expand: bool = False, **options: Any
    ) -> None:
        if basis not in BASES:
            raise ValueError(f"module edit: unknown basis {basis!r}; this file is older than the checkpoint")
        super().__init__(size if expand else size - 1, eps, **options)
        self.basis, self.expand = basis, expand

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, basis={self.basis}, expand={self.expand}"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of any float dtype along ``axis``; the same dtype out."""
        if self.expand:
            return super().forward(lift(input, self.axis, self.basis)).to(input.dtype)
        if self.basis != "paper":
            return super().forward(input)
        if self.channels_last:
            return _two_sums(input.movedim(self.axis, -1).contiguous(), -1, self.eps).movedim(-1, self.axis)
        input = input.contiguous() if self.axis in (-1, input.ndim - 1) else input
        return _two_sums(input, self.axis, self.eps)


def _two_sums(x: Tensor, axis: int, eps: float) -> Tensor:
    """x / sqrt((sum(x^2) + sum(x)^2) / d + eps) for d - 1 numbers x (CRMSNorm of arXiv 2305.14858)."""
    wide = x.to(wide_dtype(x))
    # sum(x)^2 before the squares are added: of a mean-free vector neither is larger than d times the other
    total = wide.sum(axis, keepdim=True).square() + wide.square().sum(axis, keepdim=True)
    result: Tensor = (wide * torch.rsqrt(total * (1.0 / (x.shape[axis] + 1)) + eps)).to(x.dtype)
    return result


class LayerNorm(RMSNorm):
    """RMSNorm of x - mean(x), for a class that has its eps as a number in its code: here it may be another."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of any float dtype along ``axis``; same shape and dtype out."""
        x = input.movedim(self.axis, -1).to(wide_dtype(input))
        weight, bias = getattr(self, self.weight_name), getattr(self, self.bias_name)
        weight = weight if weight is None else weight.reshape(-1).to(x.dtype) + self.offset
        bias = bias if bias is None else bias.reshape(-1).to(x.dtype)
        y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(input.dtype).movedim(-1, self.axis)


NORMS: dict[str, Callable[..., nn.Module]] = {"rmsnorm": RMSNorm, "crmsnorm": CRMSNorm, "layernorm": LayerNorm}
"""Kinds of norms that a plan may ask for."""
