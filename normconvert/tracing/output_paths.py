"""What a model returns, as named values: one naming for the trace, the plan, its notes and the verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

CACHES = frozenset({"cache", "past_key_values", "mems", "cache_params", "past_buckets_states"})
"""Keys of outputs that hold a cache, not a result."""


def named_values(output: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in an output that is no container: ``logits``, ``hidden_states.0``, ``0``.

    The keys and indices on the way are joined by dots; a bare value is ``output``.
    """
    items: Iterator[tuple[Any, Any]]
    if isinstance(output, Mapping):
        items = iter(output.items())
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    elif is_dataclass(output) and not isinstance(output, type):
        items = iter([(f.name, getattr(output, f.name)) for f in fields(output)])
    else:
        yield name or "output", output
        return
    for key, value in items:
        yield from named_values(value, f"{name}.{key}" if name else str(key))


def tensors_in(output: Any) -> dict[str, Tensor]:
    """The floating tensors of an output by path; caches and integers are left out."""
    return {
        name: value.detach()
        for name, value in named_values(output)
        if isinstance(value, Tensor) and value.is_floating_point() and CACHES.isdisjoint(name.split("."))
    }
