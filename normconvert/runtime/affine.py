"""What is left of norms whose statistics are fixed: a multiplication, a clamp, or the activation behind them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from normconvert.runtime.kernels import is_plain


class PostActivation(nn.Sequential):
    """What is left of a norm that has moved into its neighbours: the activation that it applied.

    The children that stay keep their names, so that their parameters do, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply what is left to ``input``."""
        for child in self:
            input = child(input)
        return input


class Clip(nn.Module):
    """clamp(x - start, lower, upper), channel by channel: what is left of a norm and the ReLU behind it.

    relu(a x + b) = a max(x + b / a, 0) if a > 0, a min(x + b / a, 0) if a < 0: the linear map that reads it takes a.

    Args:
        shape: of the three: (channels, 1, ...), which broadcasts over the input's leading dimensions.
        like: a tensor whose device and dtype they have.
        owned: the input is made for this module alone: without gradients, its memory is used for the result.
    """

    start: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(self, shape: Iterable[int], like: Tensor | None = None, owned: bool = False) -> None:
        super().__init__()
        self.owned = owned
        like = torch.empty(0) if like is None else like
        self.register_buffer("start", like.new_zeros(tuple(shape)))
        self.register_buffer("lower", like.new_zeros(tuple(shape)))
        self.register_buffer("upper", like.new_full(tuple(shape), torch.inf))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.start.numel()}"

    def forward(self, input: Tensor) -> Tensor:
        """Shift and clamp ``input``; same shape and dtype out."""
        start, lower, upper = self.start, self.lower, self.upper
        if start.dtype is not input.dtype:  # autocast
            start, lower, upper = start.to(input.dtype), lower.to(input.dtype), upper.to(input.dtype)
        if is_compiling() or not is_plain(input, start, lower, upper):
            return torch.minimum(torch.maximum(input - start, lower), upper)
        owned = self.owned and not torch.is_grad_enabled() and type(input) is Tensor
        x = input.sub_(start) if owned else input - start
        if not x.is_cpu:
            return torch.clamp(x, lower, upper)
        # Each as fast as a ReLU; on a CPU clamp with two tensors takes five times as long.
        if not bool(lower.any()) and bool((upper == torch.inf).all()):
            return x.relu_()
        return torch.minimum(torch.maximum(x, lower), upper)


class Affine(nn.Module):
    """y = x * (weight / sqrt(eps)) + bias, channel by channel: a norm whose statistics are fixed.

    The weight and bias are those of the norm that it stands for. With a large ``eps``, a LayerNorm that divides by
    sqrt(var + eps) computes the same of a mean-free x, so that code which knows nothing of this class can, too.

    Args:
        size: number of channels.
        eps: see above; 1.0 leaves the weight as it is.
        axis: of the channels in the input.
        weight: shape (size,), or (1, size), which no other norm loads by mistake.
        bias: shape (size,).
        weight_name: name the weight is registered under.
        bias_name: name the bias is registered under.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1.0,
        *,
        axis: int = -1,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        weight_name: str = "weight",
        bias_name: str = "bias",
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.axis = (size,), eps, axis
        self.weight_name, self.bias_name = weight_name, bias_name
        self.register_parameter(weight_name, nn.Parameter(torch.ones(size)) if weight is None else weight)
        self.register_parameter(bias_name, nn.Parameter(torch.zeros(size)) if bias is None else bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.normalized_shape[0]}" + (f", axis={self.axis}" if self.axis != -1 else "")

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift ``input``; same shape and dtype out."""
        weight, bias = getattr(self, self.weight_name), getattr(self, self.bias_name)
        if self.eps != 1.0:
            weight = weight * self.eps**-0.5
        trailing = input.ndim - 1 - self.axis % input.ndim
        if trailing or weight.ndim > 1:
            weight, bias = weight.reshape(-1, *[1] * trailing), bias.reshape(-1, *[1] * trailing)
        return input * weight + bias
