"""Values that modules worked out while the model ran, and would not work out again: a head normalised once, say.

A model in memory may have run before. What it keeps of its weights then hides from a trace who reads them, and is stale
once they are edited. A cache is told from a constant by what the model does without it: it fills it in again, with the
same values, and returns what it returned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.compat.torch import pytree
from normconvert.tracing.model_copy import copy_model, plain_tensors
from normconvert.tracing.output_paths import tensors_in
from normconvert.verification.probe_runs import run_once

_ABSENT = object()


@dataclass(frozen=True)
class Cache:
    """An attribute that the model fills in again.

    Attributes:
        path: of the module.
        name: of the attribute.
        empty: what it is before that; a marker if it is not there.
    """

    path: str
    name: str
    empty: Any

    def forget(self, model: nn.Module) -> None:
        """Empty it in ``model``, or in a copy."""
        holder = model.get_submodule(self.path)
        if self.empty is _ABSENT:
            vars(holder).pop(self.name, None)
        else:
            setattr(holder, self.name, copy.copy(self.empty))


def caches_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Cache]:
    """The attributes of modules with floating tensors in them that ``model`` fills in again; it stays as it is.

    Args:
        model: with its weights, anywhere.
        inputs: keyword arguments that its forward takes, where it is. If it does not, there is nothing to tell.
    """
    if not any(tensor.is_floating_point() for _, _, _, tensor in plain_tensors(model)):
        return []
    copied = copy_model(model).eval()
    before = _run(copied, inputs)  # what it keeps for inputs of this size is kept from here on
    if before is None:
        return []
    groups: dict[tuple[type, str], dict[str, None]] = {}
    for path, holder, name, tensor in plain_tensors(copied):
        if tensor.is_floating_point():
            groups.setdefault((type(holder), name), {})[path] = None
    found: list[Cache] = []
    for (_, name), paths in groups.items():
        found += _refilled(copied, [(path, name) for path in paths], inputs, before)
    return found


def _floats(value: Any) -> Iterator[Tensor]:
    yield from (one for one in pytree.tree_leaves(value) if isinstance(one, Tensor) and one.is_floating_point())


def _refilled(
    model: nn.Module, places: list[tuple[str, str]], inputs: Mapping[str, Any], before: dict[str, Tensor]
) -> list[Cache]:
    """The attributes at ``places``, all of one name and class, as caches; none if one of them is a constant."""
    kept = [vars(model.get_submodule(path))[name] for path, name in places]
    empties: list[Any] = [None, _ABSENT]
    if isinstance(kept[0], (dict, list)):
        empties = [copy.copy(kept[0])]
        empties[0].clear()
    for empty in empties:
        caches = [Cache(path, name, empty) for path, name in places]
        for cache in caches:
            cache.forget(model)
        after = _run(model, inputs)
        now = [vars(model.get_submodule(path)).get(name) for path, name in places]
        alike = after is not None and _same(before.values(), after.values())
        if alike and all(_same(_floats(a), _floats(b)) for a, b in zip(kept, now, strict=True)):
            return caches
        for (path, name), value in zip(places, kept, strict=True):
            vars(model.get_submodule(path))[name] = value
    return []


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    try:
        return tensors_in(run_once(model, inputs, torch.get_default_dtype()))
    except Exception:  # whatever a model raises that misses what it had
        return None


def _same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    first, second = list(a), list(b)
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(one.shape == two.shape and torch.equal(one, two) for one, two in pairs)
