"""A model with its weights moved by about a unit in the last place: how far does storing them alone take its outputs?

Half a unit (root mean square) of the stored dtype is what rounding a weight does at most, so the outputs of such a
model are another draw of the error that any checkpoint of this dtype has. A unit of float64 shows how badly
conditioned an input is: what no computation in float64 can be held to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF, WHOLE = 0.25, 1.0
"""Share of the weights that move by a unit, up or down: half a unit in the root mean square, or one."""
FLOAT32 = 2**29
"""A unit of float32, in those of float64."""
TILE = 1_048_583
"""Random moves that are drawn; a prime, so that no two rows of a matrix move alike. To draw one for each weight of a
large model takes longer than to run it."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def moved(model: nn.Module, draw: int, share: float = HALF, unit: int = 1) -> Iterator[None]:
    """While open, the stored floating tensors of ``model`` are moved; zeros, infinities and NaN stay.

    Args:
        model: changed in place, and back.
        draw: seed of the moves.
        share: :data:`HALF` or :data:`WHOLE`.
        unit: what moves a weight, in units of its own dtype: 1, or :data:`FLOAT32` for weights in float64.
    """
    generator = torch.Generator().manual_seed(draw)
    tile = torch.randint(0, 2, (TILE,), generator=generator) * 2 - 1
    tile *= (torch.rand(TILE, generator=generator) < share) * unit
    # Tied tensors lie in one place and move once.
    tensors = {value.data_ptr(): value for value in model.state_dict().values() if value.is_floating_point()}
    for value in tensors.values():
        _move(value, tile, unit)
    try:
        yield
    finally:
        for value in tensors.values():
            _move(value, -tile, unit)


def _move(value: Tensor, tile: Tensor, unit: int) -> None:
    kind = INTEGERS.get(value.element_size())
    if kind is None or not value.numel():
        return
    flat = value.detach().reshape(-1)
    # Of two neighbours in a floating dtype the bits, read as an integer, differ by one; the sign bit stands apart.
    bits, moves = flat.view(kind), tile.to(value.device, kind)
    infinite = int(torch.tensor(torch.inf, dtype=value.dtype).view(kind))
    for part in bits.split(len(moves)):
        size = part & torch.iinfo(kind).max
        part += moves[: len(part)] * ((size > 2 * unit) & (size < infinite - 2 * unit))
    if flat.data_ptr() != value.data_ptr():
        value.data.copy_(flat.view(value.shape))
