"""Finding a module of a model, and putting another in its place."""

from __future__ import annotations

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
