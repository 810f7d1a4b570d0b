"""Kernels of RMSNorm: functions of a call's shape, dtype and device, never of the numbers in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.jit import is_tracing  # type: ignore[attr-defined]

Kernel = Callable[[Tensor, "Tensor | None", "Tensor | None", int, float], Tensor]
"""(x, weight + offset, bias, axis, eps) -> y, shape and dtype of x."""

FUSED_ON = ("cuda", "xpu", "mps")
"""Devices whose ``F.rms_norm`` is one kernel in eager mode; elsewhere it is a chain of small ones."""


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call is as it looks: not traced, not under vmap or grad of torch.func, on no subclass of Tensor.

    Otherwise results cannot be written in place, nor may code depend on where a tensor lies in memory.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if is_tracing() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given):
        return False
    try:
        for tensor in given:
            tensor.untyped_storage()
    except RuntimeError:  # what torch.func maps over or differentiates has no memory of its own
        return False
    return True


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32 for 16-bit inputs, the input's own otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def choose_kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int) -> Kernel:
    """The kernel for a call; all of them compute the same function.

    Exporters know torch's one operator (ONNX has RMSNormalization); a compiler fuses the formula.
    """
    if not _fits_fused(x, weight, bias, axis):
        return formula
    if is_compiling():
        return fused_rms if is_exporting() else formula
    return fused_rms if x.device.type in FUSED_ON and is_plain(x, weight, bias) else formula


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


def fused_rms(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """torch's own RMSNorm, last axis only; it knows no bias."""
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias
