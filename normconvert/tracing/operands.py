"""The tensors that a function of torch is called with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def operands(args: Iterable[Any], kwargs: dict[str, Any] | None) -> list[Tensor]:
    """All tensors among the arguments, in order, those in tuples, lists and dictionaries as well.

    A mode that looks at every call of a model asks this thousands of times a trace. ``pytree.tree_leaves``, which also
    opens what libraries register, takes a tenth of the whole; functions of torch take nothing of that kind.
    """
    found: list[Tensor] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs.values(), found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)
