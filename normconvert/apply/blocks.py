"""Edits applied block by block, so that float64 is needed for a block and not for a tensor.

The blocks depend on the tensor alone, and each value on its block alone: the result is the same bits in whatever order
and by however many threads the blocks are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from normconvert.apply.memory import memory
from normconvert.plan.edits import Edit, Lookup, apply_edits

BLOCK = 1 << 17  # elements edited at a time: 1 MiB in float64, which stays in the cache
See = Callable[[Tensor, Tensor], None]
LINE = 64  # bytes a cache holds together: narrower blocks of columns would fetch each line several times

HALVES = (torch.float16, torch.bfloat16)

# Which dimension of a tensor an edit needs whole; along the others it may be applied block by block.
# An edit that is not here needs the whole tensor.
NEEDS_WHOLE: dict[str, Callable[[Edit, int], set[int]]] = {
    "center": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "scale": lambda edit, ndim: {0, 1} if "groups" in edit else {int(edit["axis"]) % ndim},
    "times": lambda edit, ndim: set(),
    "shift": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "fill": lambda edit, ndim: set(),
    "compress": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "read_compressed": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "drop": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "rotate": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "normed": lambda edit, ndim: {int(edit["axis"]) % ndim},
}


def block_dimension(edits: Sequence[Edit], before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The dimension along which the edits may be applied block by block; None: only to the whole.

    Args:
        edits: rows of a plan.
        before: the tensor's shape.
        after: its shape when they are applied.
    """
    # An empty tensor has no blocks (their size is a share of its elements), one of other dimensions no common one.
    if not before or len(after) != len(before) or 0 in before:
        return None
    whole: set[int] = set()
    for edit in edits:
        if edit["op"] not in NEEDS_WHOLE:
            return None
        whole |= NEEDS_WHOLE[edit["op"]](edit, len(before))
        # A block would not know which of its rows are in the part.
        whole |= {int(edit["part"][0])} if "part" in edit else set()
    # Each block of the result has its place at the same rows only where the dimension keeps its length.
    free = [dim for dim in range(len(before)) if dim not in whole and after[dim] == before[dim]]
    # Blocks along dimension 0 lie in one piece in the file: they need not be gathered in memory.
    if 0 in free:
        return 0
    return max(free, key=lambda dim: before[dim], default=None)


def centres_rows(edits: Sequence[Edit], before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether the edits begin with centring dimension 0, and the others may be applied to some rows at a time.

    Then two passes over the rows do: one for their mean, one to subtract it, without the whole tensor in memory.
    """
    if not edits or edits[0]["op"] != "center" or len(before) < 2 or before[0] == 0:
        return False
    first = edits[0]
    # An axis that is a factor of dimension 0 has one mean for each of the other factors: two passes compute one.
    plain = int(first["axis"]) % len(before) == 0 and int(first.get("outer", 1)) == int(first.get("inner", 1)) == 1
    return plain and block_dimension(edits[1:], before, after) == 0


def mean_of_rows(pieces: Iterable[Tensor], count: int, workspace: Workspace) -> Tensor:
    """The mean over dimension 0 of ``count`` rows that come in pieces, in float64."""
    total, shape = torch.empty(0), (0,)
    for piece in pieces:
        # Added up before the next piece is asked for, which may come in the same memory.
        rows = workspace.widened(piece).flatten(1)
        if total.numel() == 0:
            total, shape = rows.new_zeros(rows.shape[1]), (1, *piece.shape[1:])
        total.addmv_(rows.T, rows.new_ones(len(rows)))  # much faster than sum(0)
    return total.div_(count).reshape(shape)


def blocks(shape: tuple[int, ...], dim: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``dim`` that hold about :data:`BLOCK` elements each."""
    step = max(1, BLOCK * shape[dim] // math.prod(shape))
    if dim == len(shape) - 1 and step * itemsize > LINE:
        step -= step % (LINE // itemsize)
    for start in range(0, shape[dim], step):
        yield start, min(start + step, shape[dim])


class Workspace:
    """Memory that one thread works in again and again: fresh memory costs a page fault for every page of it."""

    def __init__(self) -> None:
        # By use: the raw bytes, both wider forms and the result of a block are alive at the same time.
        self._held: dict[str, Tensor] = {}

    def take(self, use: str, size: int) -> Tensor:
        """``size`` bytes; what was taken for the same ``use`` before is overwritten."""
        if use not in self._held or len(self._held[use]) < size:
            self._held.pop(use, None)  # before the new one is there
            self._held[use] = memory(size)
        return self._held[use][:size]

    def empty(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without values, in memory as :meth:`take` gives it."""
        return self.take(use, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def raw(self, size: int) -> Tensor:
        """Memory for what is read from a file."""
        return self.take("raw", size)

    def widened(self, block: Tensor) -> Tensor:
        """``block`` in float64."""
        shape = tuple(block.shape)
        if block.dtype in HALVES:  # exact either way, and twice as fast by way of float32
            block = self.empty("single", shape, torch.float32).copy_(block)
        return self.empty("wide", shape, torch.float64).copy_(block)


def edit_rows(
    rows: Tensor, edits: Sequence[Edit], lookup: Lookup, target: torch.dtype, workspace: Workspace, mean: Tensor | None,
    see: See = lambda exact, stored: None,
) -> Tensor:  # fmt: skip
    """Some rows of a tensor with edits that may be applied to rows, after ``mean`` is subtracted, in ``target``.

    The result holds until the next call. ``see`` is called with it in float64 and as it is stored.
    """
    wide = workspace.widened(rows)
    block = apply_edits(wide if mean is None else wide.sub_(mean), edits, lookup, own=True)
    stored = workspace.empty("whole", tuple(block.shape), target).copy_(block)
    see(block, stored)
    return stored


def edit_whole(
    value: Tensor,
    edits: Sequence[Edit],
    lookup: Lookup,
    target: torch.dtype,
    *,
    in_place: bool = False,
    workspace: Workspace | None = None,
    see: See = lambda exact, stored: None,
) -> Tensor:
    """``apply_edits(value, edits, lookup).to(target)``, with float64 for one block at a time where the edits permit.

    Args:
        value: any shape and floating dtype.
        edits: rows of a plan.
        lookup: gives the source value of another tensor.
        target: dtype of the result.
        in_place: ``value`` may be overwritten.
        workspace: memory for the blocks, and for the result, which then holds until the next call.
        see: called with each block in float64 and as it is stored.
    """
    dim = block_dimension(edits, tuple(value.shape), tuple(value.shape))
    if dim is None:
        exact = apply_edits(value, edits, lookup)
        stored = exact.to(target)
        see(exact, stored)
        return stored
    whole, blockwise = value, workspace or Workspace()
    # Its shape may stand for the result's: no edit of NEEDS_WHOLE changes a dimension that it does not need whole.
    for start, stop in blocks(tuple(value.shape), dim, value.element_size()):
        wide = blockwise.widened(value.narrow(dim, start, stop - start))
        block = apply_edits(wide, edits, lookup, own=True)
        shape = (*block.shape[:dim], value.shape[dim], *block.shape[dim + 1 :])  # other dimensions may have shrunk
        # In place, a block is written over what it alone was made of: the blocks to come read other elements.
        if start == 0 and not (in_place and value.dtype == target and value.shape == shape):
            whole = torch.empty(shape, dtype=target) if workspace is None else workspace.empty("whole", shape, target)
        see(block, whole.narrow(dim, start, stop - start).copy_(block))
    return whole
