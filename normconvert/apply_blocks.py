"""Edits applied block by block, so that float64 is needed for a block and not for a tensor.

The blocks depend on the tensor alone, and each value on its block alone: the result is the same bits in whatever order
and by however many threads the blocks are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from normconvert.edits import Edit, Lookup, apply_edits

BLOCK = 1 << 17  # elements edited at a time: 1 MiB in float64, which stays in the cache
LINE = 64  # bytes a cache holds together: narrower blocks of columns would fetch each line several times

# Which dimension of a tensor an edit needs whole; along the others it may be applied block by block.
# An edit that is not here needs the whole tensor.
NEEDS_WHOLE: dict[str, Callable[[Edit, int], set[int]]] = {
    "center": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "scale": lambda edit, ndim: {0, 1} if "groups" in edit else {int(edit["axis"]) % ndim},
    "shift": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "fill": lambda edit, ndim: set(),
    "compress": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "read_compressed": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "drop": lambda edit, ndim: {int(edit["axis"]) % ndim},
}


def block_dimension(edits: Sequence[Edit], before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The dimension along which the edits may be applied block by block; None: only to the whole.

    Args:
        edits: rows of a plan.
        before: the tensor's shape.
        after: its shape when they are applied.
    """
    if not before or len(after) != len(before) or 0 in before:
        return None
    whole: set[int] = set()
    for edit in edits:
        if edit["op"] not in NEEDS_WHOLE:
            return None
        whole |= NEEDS_WHOLE[edit["op"]](edit, len(before))
    free = [dim for dim in range(len(before)) if dim not in whole and after[dim] == before[dim]]
    if 0 in free:
        return 0
    return max(free, key=lambda dim: before[dim], default=None)


def blocks(shape: tuple[int, ...], dim: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``dim`` that hold about :data:`BLOCK` elements each."""
    step = max(1, BLOCK * shape[dim] // math.prod(shape))
    if dim == len(shape) - 1 and step * itemsize > LINE:
        step -= step % (LINE // itemsize)
    for start in range(0, shape[dim], step):
        yield start, min(start + step, shape[dim])


def edit_whole(
    value: Tensor, edits: Sequence[Edit], lookup: Lookup, target: torch.dtype, *, in_place: bool = False
) -> Tensor:
    """``apply_edits(value, edits, lookup).to(target)``, with float64 for one block at a time where the edits permit.

    Args:
        value: any shape and floating dtype.
        edits: rows of a plan.
        lookup: gives the source value of another tensor.
        target: dtype of the result.
        in_place: ``value`` may be overwritten.
    """
    dim = block_dimension(edits, tuple(value.shape), tuple(value.shape))
    if dim is None:
        return apply_edits(value, edits, lookup).to(target)
    whole = value
    for start, stop in blocks(tuple(value.shape), dim, value.element_size()):
        block = apply_edits(value.narrow(dim, start, stop - start), edits, lookup)
        shape = (*block.shape[:dim], value.shape[dim], *block.shape[dim + 1 :])  # other dimensions may have shrunk
        if start == 0 and not (in_place and value.dtype == target and value.shape == shape):
            whole = torch.empty(shape, dtype=target)
        whole.narrow(dim, start, stop - start).copy_(block)
    return whole
