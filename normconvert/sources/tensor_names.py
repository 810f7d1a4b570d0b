"""Which names of a model are one tensor, and which of them a checkpoint leaves without a value."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from normconvert.compat.transformers import may_be_missing, may_be_unexpected
from normconvert.errors import InputError
from normconvert.files.safetensors_file import FLOATING
from normconvert.files.tensor_info import TensorInfo
from normconvert.identification.building import STATISTICS

if TYPE_CHECKING:
    import torch
    from torch import nn


class DoesNotFit(InputError):
    """Tensors that a class needs are not there under the names that they have in it."""


def strays(tensors: Iterable[TensorInfo], model: nn.Module, used: Collection[str]) -> list[str]:
    """Tensors of floats that the class neither uses, nor makes itself, nor is known to leave alone."""
    ignored = [re.compile(pattern) for pattern in may_be_unexpected(model)]
    buffers = [name for name, _ in model.named_buffers()]
    return [
        info.name for info in tensors
        if info.name not in used
        and info.dtype in FLOATING
        and not any(f".{info.name}".endswith(f".{own}") or f".{own}".endswith(f".{info.name}") for own in buffers)
        and not any(pattern.search(info.name) for pattern in ignored)
    ]  # fmt: skip


def tied_groups(
    state: Mapping[str, torch.Tensor], declared: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Groups of state dict names that are one tensor, by identity or as the library declares (target -> source)."""
    root = {name: name for name in state}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        root[name] = root[first.setdefault(id(tensor), name)]
    for target, origin in (declared or {}).items():
        if target in root and origin in root:
            old, new = root[target], root[origin]
            root = {name: new if r == old else r for name, r in root.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, r in root.items():
        groups[r].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def names_apart(
    groups: Iterable[tuple[str, ...]], declared: Mapping[str, str], read: Mapping[str, Callable[[], torch.Tensor]]
) -> tuple[frozenset[str], tuple[tuple[str, ...], ...]]:
    """Which names that a model ties have values of their own, since a checkpoint holds several that differ.

    transformers ties a head to its table (target -> source) only if the checkpoint lacks one of them or they are equal:
    the source's value counts where it is stored, else that of the first target.

    Args:
        groups: as :func:`tied_groups` gives them.
        declared: target -> source, in the library's order.
        read: name -> gives the value that is stored for it.

    Returns:
        The names, and the groups without them.

    Raises:
        ValueError: names that are one by their class, and not by declaration, differ: the last one read would win.
    """
    apart: set[str] = set()
    for group in groups:
        order = [n for n in group if n in declared.values()] + [n for n in declared if n in group]
        first, *others = [n for n in dict.fromkeys([*order, *group]) if n in read] or [""]
        differing = [name for name in others if not _equal(read[first](), read[name]())]
        if unsaid := [name for name in differing if name not in order or first not in order]:
            raise ValueError(f"{first} and {unsaid[0]} are one parameter of the model, but differ in the files")
        apart.update(differing)
    left = (tuple(name for name in group if name not in apart) for group in groups)
    return frozenset(apart), tuple(group for group in left if len(group) > 1)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if a.shape != b.shape:
        return False
    wide = torch.promote_types(a.dtype, b.dtype)
    return (a.data_ptr() == b.data_ptr() and a.dtype == b.dtype) or torch.equal(a.to(wide), b.to(wide))


def missing_names(
    model: nn.Module, state: Mapping[str, torch.Tensor], found: Iterable[str], tied: Iterable[tuple[str, ...]]
) -> list[str]:
    """The names of ``state`` that have no value: neither found, nor tied to one found, nor filled by the model itself.

    Args:
        model: whose ``state`` it is.
        state: its ``state_dict``.
        found: names that the checkpoint has.
        tied: as :func:`tied_groups` gives them.
    """
    present = set(found)
    for group in tied:
        if present.intersection(group):
            present.update(group)
    buffers = {name for name, _ in model.named_buffers()}
    allowed = [re.compile(pattern) for pattern in may_be_missing(model)]
    return [
        name for name in state
        if name not in present
        and (name not in buffers or name.endswith(STATISTICS))
        and not any(pattern.search(name) for pattern in allowed)
    ]  # fmt: skip
