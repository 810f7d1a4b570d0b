"""A parameter under another name, so that the plain architecture misses it; its module sees it under the old one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normconvert.runtime.modules import Derived, derive, get_module

RENAMED = "{}_beside_linear_attention"


class Renamed(Derived):
    """Before the own class of a module, one of whose parameters is kept under another name."""

    @classmethod
    def members(cls, kind: Any, *settings: Any) -> dict[str, Any]:
        """The parameter under its old name."""
        (name,) = settings
        return {name: property(lambda self: self._parameters[RENAMED.format(name)])}


def rename(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Keep a module's parameter ``name`` under another name.

    transformers fills in what a checkpoint lacks, and passes over what it has beside; both with a warning only. What
    was trained with another attention would be loaded so, if all of its other parameters were where they have been.

    Raises:
        ValueError: the module has no parameter of that name of its own.
    """
    module, name = get_module(model, edit["path"]), edit["name"]
    if module._parameters.get(name) is None:
        raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) has no parameter {name!r}")
    module._parameters[RENAMED.format(name)] = module._parameters.pop(name)
    module.__class__ = derive(type(module), Renamed, name)
