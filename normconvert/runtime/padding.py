"""Linear maps of an odd number of results, which are slow on CPUs, compute one more and drop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from normconvert.runtime.kernels import is_plain

PADDED_FROM = (64, 8)
"""CPU: rows of an input from which on a linear map of an odd number of results is slower than one of one result more:
weights kept as (outputs, inputs), and as (inputs, outputs). Measured by tools/benchmarks/writers.py."""

# Private in torch: a version without it takes the plain path everywhere.
_mode_active: Callable[[], bool] = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: True)


def _transposed(module: nn.Module) -> bool | None:
    """Whether a linear map keeps its weight as (inputs, outputs); None if its class is not known."""
    kind = type(module)
    if kind is nn.Linear:
        return False
    return True if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" else None


class Padded:
    """A linear map that computes one result more than it has, and drops it: its number of results is odd.

    The class of a module is exchanged for one that has this before its own class. Its parameters keep shape, values and
    names. Only the memory behind them gets room for one more: what lies there does not matter, since it is dropped.
    """

    _room: Any = None  # (wide weight, wide bias, results, the parameters' places and shapes), made by a call

    def forward(self: Any, input: Tensor) -> Tensor:
        """As the class does."""
        held = self._parameters
        if (
            is_compiling()
            or not is_plain(input)
            or input.numel() < PADDED_FROM[self._transposed] * input.shape[-1]
            or torch.is_grad_enabled()
            or not input.is_cpu
            or held.get("weight") is None  # parametrised
            or held["weight"].dtype is not input.dtype  # quantised, or autocast
            or torch.is_autocast_enabled("cpu")
            or _mode_active()  # whoever looks at all calls is not to see parameters move
        ):
            return self._plainly(input)
        weight, bias = held["weight"], held.get("bias")
        room = self._room
        if room is None or room[3:] != (weight.data_ptr(), weight.shape, bias if bias is None else bias.data_ptr()):
            room = self._make_room(weight, bias)
            if room is None:
                return self._plainly(input)
        return F.linear(input, room[0], room[1]).narrow(-1, 0, room[2])

    def _plainly(self: Any, input: Tensor) -> Tensor:
        plain: Tensor = super().forward(input)  # type: ignore[misc]
        return plain

    def _make_room(self: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
        """Where the parameters have room now, with views of them that take it in; None if they must not move."""
        if type(weight) not in (nn.Parameter, Tensor):  # one that is read from a file when it is used, say
            return None
        if weight.is_inference() or weight.is_shared():  # made in inference mode; other processes have it, too
            return None
        across = int(self._transposed)
        wide = _with_room(weight, across)
        wide_bias = None if bias is None else _with_room(bias, 0)
        places = weight.data_ptr(), weight.shape, bias if bias is None else bias.data_ptr()
        # The views keep the memory, so no other tensor can come to lie there while they are held.
        self._room = (wide.t() if across else wide, wide_bias, weight.shape[across], *places)
        return self._room

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_room", None)  # casts and other devices: the old memory is not to be kept
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copied and pickled by its own class, since classes made on demand have no place where pickle finds them."""
        state = {name: value for name, value in self.__dict__.items() if name != "_room"}
        return _made_again, (type(self).__mro__[2],), state

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self._transposed and not keep_vars and f"{prefix}weight" in destination:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()  # formats ask for it


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


_PADDED: dict[type, type] = {}


def pad(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> None:
    """Let a linear map whose number of results has become odd compute one more, where that is faster."""
    transposed = _transposed(module)
    if transposed is None or old[int(transposed)] % 2 or new[int(transposed)] % 2 == 0:
        return
    module.__class__ = _padded(type(module), transposed)


def _padded(kind: type, transposed: bool) -> type:
    if kind not in _PADDED:
        body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _PADDED[kind] = type(kind.__name__, (Padded, kind), {**body, "_transposed": transposed})
    return _PADDED[kind]


def _made_again(kind: type) -> Any:
    module: Any = object.__new__(kind)
    module.__class__ = _padded(kind, bool(_transposed(module)))
    return module
