"""Linear maps of an odd number of results, which are slow on CPUs, compute one more and drop it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from normconvert.runtime.kernels import is_plain
from normconvert.runtime.modules import Derived, derive

PADDED_FROM = (64, 8)
"""CPU: rows of an input from which on a linear map of an odd number of results is slower than one of one result more:
weights kept as (outputs, inputs), and as (inputs, outputs). Measured by tools/benchmarks/writers.py."""


def _transposed(module: nn.Module) -> bool | None:
    """Whether a linear map keeps its weight as (inputs, outputs); None if its class is not known."""
    kind = type(module)
    if kind is nn.Linear:
        return False
    return True if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" else None


class Padded(Derived):
    """A linear map that computes one result more than it has, and drops it: its number of results is odd.

    The class of a module is exchanged for one that has this before its own class. Its parameters keep shape, values and
    names. Only the memory behind them gets room for one more: what lies there does not matter, since it is dropped.
    """

    _transposed: bool

    @classmethod
    def members(cls, kind: Any, *settings: Any) -> dict[str, Any]:
        """Whether the weight is kept as (inputs, outputs)."""
        return {"_transposed": settings[0]}

    def forward(self: Any, input: Tensor) -> Tensor:
        """As the class does."""
        weight, bias = self.weight, self.bias
        if (
            is_compiling()
            or not is_plain(input)
            or input.numel() < PADDED_FROM[self._transposed] * input.shape[-1]
            or torch.is_grad_enabled()
            or not input.is_cpu
            or not _may_move(weight)
            or not (bias is None or _may_move(bias))
            or weight.dtype is not input.dtype  # quantised, or autocast
            or torch.is_autocast_enabled("cpu")
            or has_torch_function((input,))  # a mode: whoever looks at all calls is not to see parameters move
        ):
            plain: Tensor = super().forward(input)  # type: ignore[misc]
            return plain
        across = int(self._transposed)
        wide = _with_room(weight, across)
        return F.linear(input, wide.t() if across else wide, None if bias is None else _with_room(bias, 0)).narrow(
            -1, 0, weight.shape[across]
        )


def _may_move(parameter: Tensor) -> bool:
    """Whether nobody else relies on where a parameter lies in memory.

    Not so if it is parametrised or read from a file when it is used, made in inference mode, or shared with processes.
    """
    return type(parameter) is nn.Parameter and not parameter.is_inference() and not parameter.is_shared()


def _with_room(parameter: nn.Parameter, dim: int) -> Tensor:
    """The parameter with one entry more along ``dim``, of any value; if need be it moves to where there is room."""
    size = parameter.shape[dim] + 1
    shape = (*parameter.shape[:dim], size, *parameter.shape[dim + 1 :])
    stride = parameter.stride()
    end = parameter.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    dense = stride[-1] == 1 and (dim == parameter.ndim - 1 or stride[0] == parameter.shape[-1])
    fits = end * parameter.element_size() <= parameter.untyped_storage().nbytes()
    if not (dense and fits and (dim == 0 or stride[0] >= size)):
        with torch.inference_mode(False), torch.no_grad():
            parameter.data = parameter.new_zeros(shape).narrow(dim, 0, size - 1).copy_(parameter)
        stride = parameter.stride()
    return parameter.as_strided(shape, stride)


def pad(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> None:
    """Let a linear map whose number of results has become odd compute one more, where that is faster."""
    transposed = _transposed(module)
    if transposed is None or old[int(transposed)] % 2 or new[int(transposed)] % 2 == 0:
        return
    module.__class__ = derive(type(module), Padded, transposed)
    if transposed:
        module.register_state_dict_post_hook(_contiguous)


def _contiguous(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Formats of files ask for it."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and not isinstance(weight, nn.Parameter):
        state[f"{prefix}weight"] = weight.contiguous()
