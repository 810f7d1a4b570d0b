"""Kernels of RMSNorm: functions of a call's shape, dtype and device, never of the numbers in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.jit import is_tracing  # type: ignore[attr-defined]

Kernel = Callable[[Tensor, "Tensor | None", "Tensor | None", int, float], Tensor]
"""(x, weight + offset, bias, axis, eps) -> y, shape and dtype of x."""

FUSED_ON = ("cuda", "xpu", "mps")
"""Devices whose ``F.rms_norm`` is one kernel in eager mode; elsewhere it is a chain of small ones."""

# Private in torch: a version without these takes the plain path everywhere.
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def is_plain(x: Tensor) -> bool:
    """Whether a call is as it looks: not traced, not under vmap or grad of torch.func, on no subclass of Tensor.

    Otherwise results cannot be written in place, nor may code depend on where a tensor lies in memory.
    """
    return type(x) in (Tensor, nn.Parameter) and not (is_tracing() or _transforms_active())


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32 for 16-bit inputs, the input's own otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def choose_kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int) -> Kernel:
    """The kernel for a call; all of them compute the same function.

    Exporters know torch's one operator (ONNX has RMSNormalization); a compiler fuses the formula.
    """
    if is_compiling():
        return fused_rms if is_exporting() and _fits_fused(x, weight, bias, axis) else formula
    if not is_plain(x):
        return formula
    if x.device.type in FUSED_ON and _fits_fused(x, weight, bias, axis):
        return fused_rms
    return formula if torch.is_grad_enabled() else in_place


def _fits_fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int) -> bool:
    """Whether ``F.rms_norm`` takes these: the last axis, one vector each, one dtype."""
    return axis == -1 and all(v is None or (v.shape == x.shape[-1:] and v.dtype == x.dtype) for v in (weight, bias))


def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """The definition, operation by operation: what autograd differentiates and a compiler fuses."""
    wide = x.to(wide_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    result: Tensor = y.to(x.dtype)
    return result


def in_place(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """The definition with one pass for the sum of squares and no temporaries but the result; not differentiable."""
    # For few tokens each operation counts: three instead of one for the mean and eps are half a hundredth of a GPT-2
    # small's call, two instead of one for weight and bias about as much of one token's.
    scale = torch.linalg.vector_norm(x, 2, axis, True, dtype=wide_dtype(x))
    if x.is_cpu:
        scale = torch.addcmul(_number(eps, scale.dtype), scale, scale, value=1.0 / x.shape[axis])
    else:
        scale = scale.square_().mul_(1.0 / x.shape[axis]).add_(eps)
    y: Tensor = x * scale.rsqrt_()
    if weight is not None and bias is not None and weight.dtype == bias.dtype == y.dtype:
        return torch.addcmul(bias, y, weight, out=y)
    if weight is not None:
        y = y.mul_(weight)
    if bias is not None:
        y = y.add_(bias)
    return y.to(x.dtype)


@lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the CPU, to be read only."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def fused_rms(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """torch's own RMSNorm, last axis only; it knows no bias."""
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias
