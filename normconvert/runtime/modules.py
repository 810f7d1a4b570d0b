"""Finding a module of a model, putting another in its place, and another class in that of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        ValueError: the model has none there.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"module edit: {type(model).__name__} has no module {path!r}; is it another model?") from None


def stand_in(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands, with its mode and hooks."""
    new.training = old.training
    for name in vars(old).keys() & vars(nn.Identity()).keys():
        if "_hook" in name:
            new.__dict__[name] = old.__dict__[name]
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old and path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)


def run_by_calls(model: nn.Module, norm: nn.Module) -> None:
    """Have a norm's module called wherever it stands.

    torch's encoder layer, out of training and without gradients, hands the weights of its norms to a kernel that knows
    LayerNorm only. It asks this attribute, and nothing else does.

    Raises:
        ValueError: this torch's layer has no such attribute, so nobody knows what it asks.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(child is norm for child in module.children()):
            if not hasattr(module, "activation_relu_or_gelu"):
                raise ValueError(
                    f"module edit: the encoder layer of torch {torch.__version__} has no activation_relu_or_gelu; it "
                    "may hand the norm's weight to a kernel for LayerNorm"
                )
            module.activation_relu_or_gelu = 0


class Derived:
    """Before the own class of a module, which keeps parameters and attributes, and computes or is called otherwise.

    Such classes are made on demand, by :func:`derive`, so there is no place where pickle finds them: modules are copied
    and pickled by their own class and what stands before it.
    """

    derived_with: tuple[Any, ...]

    @classmethod
    def members(cls, kind: Any, *settings: Any) -> dict[str, Any]:
        """What the class before ``kind`` has that depends on it, or on the settings given to :func:`derive`."""
        return {}

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """As the module's own class, and the classes before it, the last one first."""
        kind, before = type(self), []
        while issubclass(kind, Derived):
            first, own = kind.__bases__
            before.append((first, kind.derived_with))
            kind = own
        return _derived_again, (kind, tuple(reversed(before))), self.__dict__


_DERIVED: dict[tuple[Any, ...], type] = {}


def derive(kind: type, first: type[Derived], *settings: Any) -> type:
    """``kind`` with ``first`` before it; the same class each time for the same settings, which can be hashed."""
    key = (kind, first, *settings)
    if key not in _DERIVED:
        body: dict[str, Any] = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }
        body |= {"derived_with": settings, **first.members(kind, *settings)}
        _DERIVED[key] = type(kind.__name__, (first, kind), body)
    return _DERIVED[key]


def _derived_again(kind: type, before: tuple[tuple[type[Derived], tuple[Any, ...]], ...]) -> Any:
    for first, settings in before:
        kind = derive(kind, first, *settings)
    return object.__new__(kind)
