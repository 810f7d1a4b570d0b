"""Operations at an input or output of a module: centring and compressing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from normconvert.runtime.bases import compress
from normconvert.runtime.kernels import wide_dtype
from normconvert.runtime.modules import get_module


class Center:
    """x - mean(x) along an axis, as a forward hook or a forward pre-hook of a module; picklable, copyable, stateless.

    Args:
        side: ``output`` or ``input``.
        key: where the tensor is. Output: "" the output itself, "0" an index of a tuple or list, a name of a mapping.
            Input: "0" a positional argument, a name a keyword argument.
        axis: the axis to centre.
        optional: a call may do without this input (embeddings, where token ids are given); else that is an error.
    """

    def __init__(self, side: str, key: str, axis: int, optional: bool = False) -> None:
        self.side, self.key, self.axis, self.optional = side, key, axis, optional

    def __call__(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """As a forward hook: (module, args, output). As a pre-hook with keywords: (module, args, kwargs)."""
        if self.side == "output":
            return _replace_in(rest, self.key, self._changed)
        if self.key.isdigit() and int(self.key) < len(args):
            return _replace_in(args, self.key, self._changed), rest
        if self.optional and self.key not in rest:  # left out, or given by its place
            places = dict(zip(inspect.signature(module.forward).parameters, map(str, range(len(args))), strict=False))
            return (_replace_in(args, places[self.key], self._changed) if self.key in places else args), rest
        return args, _replace_in(rest, self.key, self._changed)

    def _changed(self, x: Any) -> Any:
        return x if x is None and self.optional else self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """What is done to the tensor."""
        return center(x, self.axis)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.side!r}, key={self.key!r}, axis={self.axis})"


class Compress(Center):
    """B x along an axis, at a place as for :class:`Center`; one channel less comes out. See :data:`BASES`.

    Args:
        side: as there.
        key: as there.
        axis: as there.
        basis: one of :data:`BASES`.
        optional: as there.
        size: the channels of what is compressed; what has one less is compressed already. None: all is compressed.
    """

    def __init__(
        self, side: str, key: str, axis: int, basis: str, optional: bool = False, size: int | None = None
    ) -> None:
        super().__init__(side, key, axis, optional)
        self.basis, self.size = basis, size

    def change(self, x: Tensor) -> Tensor:
        """What is done to the tensor."""
        if self.size is not None and x.shape[self.axis] == self.size - 1:
            return x
        return compress(x, self.axis, self.basis)


def center(x: Tensor, axis: int = -1) -> Tensor:
    """x - mean(x) along ``axis``; the difference is rounded to the dtype of x once."""
    return (x - x.mean(axis, keepdim=True, dtype=wide_dtype(x))).to(x.dtype)


def _replace_in(value: Any, key: str, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value`` with the tensor at ``key`` changed."""
    if key == "":
        return change(value)
    if isinstance(value, (tuple, list)):
        items = list(value)
        items[int(key)] = change(items[int(key)])
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    value = value.copy() if type(value) is dict else value
    value[key] = change(value[key])
    return value


def add_hook(model: nn.Module, edit: Mapping[str, Any], hook: Center) -> None:
    """Let ``hook`` change one input or output of the module that ``edit`` names."""
    module = get_module(model, edit["path"])
    if hook.side == "output":
        module.register_forward_hook(hook)
    else:
        module.register_forward_pre_hook(hook, with_kwargs=True)
