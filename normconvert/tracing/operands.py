"""What a call of a function of torch is about: the tensors that it takes, and whether it asks for facts alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

FACTS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_sparse")
)
"""Attributes of a tensor that say nothing of its values; models ask for them more often than they compute."""


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
