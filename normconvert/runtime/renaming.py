"""A parameter under another name, so that the plain architecture misses it; its module sees it under the old one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normconvert.runtime.modules import get_module

RENAMED = "{}_beside_linear_attention"


class Renamed:
    """Before the own class of a module, one of whose parameters is kept under another name."""

    renamed_parameter: str

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copied and pickled by its own class, since classes made on demand have no place where pickle finds them."""
        return _renamed_again, (type(self).__mro__[2], self.renamed_parameter), self.__dict__


_RENAMED: dict[tuple[type, str], type] = {}


def _renamed(kind: type, name: str) -> type:
    if (kind, name) not in _RENAMED:
        body = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "renamed_parameter": name,
        }
        new = RENAMED.format(name)
        _RENAMED[kind, name] = type(
            kind.__name__, (Renamed, kind), {**body, name: property(lambda self: self._parameters[new])}
        )
    return _RENAMED[kind, name]


def _renamed_again(kind: type, name: str) -> Any:
    return object.__new__(_renamed(kind, name))


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
    module.__class__ = _renamed(type(module), name)
