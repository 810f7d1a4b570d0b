"""An adapter put into a model by arithmetic alone, W + s B A: what the verification runs, without PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normconvert.adapters.adapter_files import Adapter
from normconvert.adapters.low_rank import adapted, layout_of
from normconvert.errors import InputError


def merge(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Change ``model`` in place as the adapter does; computed in float64, rounded to the model's dtype once.

    A weight that several modules share changes in the module that the adapter names, and in no other: so does PEFT.

    Raises:
        InputError: the adapter names a module or tensor that the model does not have, or of another shape.
    """
    for path, change in adapter.low_rank.items():
        module = submodule(model, path)
        weight: Any = module.weight
        layout = layout_of(module, change, weight)
        _put(module, "weight", adapted(change, layout, weight).to(weight.dtype))
        if change.bias is not None:
            added = change.scaling * change.bias.double()
            old: Any = getattr(module, "bias", None)
            _put(module, "bias", (added if old is None else old.double() + added).to(weight.dtype))
    for name, value in adapter.saved.items():
        path, _, leaf = name.rpartition(".")
        module = submodule(model, path)
        current: Any = getattr(module, leaf, None)
        if not isinstance(current, Tensor) or current.shape != value.shape:
            shape = tuple(current.shape) if isinstance(current, Tensor) else "missing"
            raise InputError(f"{name} is {tuple(value.shape)} in the adapter and {shape} in the model")
        _put(module, leaf, value.to(current.dtype))
    return model


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module of that path.

    Raises:
        InputError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"the adapter names the module {path!r}, which {type(model).__name__} does not have: it was trained on "
            "another class or model; convert the original as that class"
        ) from error


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value.detach()
        return
    with torch.no_grad():
        module.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
