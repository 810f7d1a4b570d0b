"""Examples, and the order in which they are seen: a function of the seed and the step alone, so that runs resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Data(Protocol):
    """Examples to learn from or to be measured on."""

    @property
    def name(self) -> str:
        """What the user named."""

    @property
    def labelled(self) -> bool:
        """Whether every batch has ``labels``: (batch,), or (batch, positions) for language models."""

    @property
    def shifted(self) -> bool:
        """Whether the label of a position is that of the next one."""

    def __len__(self) -> int:
        """The number of examples."""

    def batch(self, indices: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """Inputs by the names of the model's arguments, and ``labels``; with a seed for each example, augmented."""


@dataclass(frozen=True)
class Columns:
    """Examples in memory: name -> (examples, ...)."""

    name: str
    columns: dict[str, Tensor]
    shifted: bool = False

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return "labels" in self.columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batch(self, indices: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """The rows at ``indices``."""
        return {name: values[indices] for name, values in self.columns.items()}


@dataclass(frozen=True)
class Part:
    """The examples of other data at ``indices``."""

    whole: Data
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the user named, and how much of it."""
        return f"{len(self.indices)} of {len(self.whole)} examples of {self.whole.name}"

    @property
    def labelled(self) -> bool:
        """As the whole."""
        return self.whole.labelled

    @property
    def shifted(self) -> bool:
        """As the whole."""
        return self.whole.shifted

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """The examples at ``indices`` of this part."""
        return self.whole.batch([self.indices[i] for i in indices], seeds)


def rows_at(step: int, size: int, examples: int, seed: int) -> list[int]:
    """The examples of one batch: a new order for each pass over the data, no example twice in a pass."""
    found: list[int] = []
    order: list[int] = []
    epoch = -1
    for position in range(step * size, (step + 1) * size):
        if position // examples != epoch:
            epoch = position // examples
            generator = torch.Generator().manual_seed(_mixed(seed, epoch))
            order = torch.randperm(examples, generator=generator).tolist()
        found.append(order[position % examples])
    return found


def training_batch(data: Data, step: int, size: int, seed: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """This process's part of a step's batch of ``size * world`` examples."""
    mine = slice(rank * size, (rank + 1) * size)
    first = step * size * world
    # By the place in the whole run, so that N processes distort as one with a batch N times as large does.
    seeds = [_mixed(seed, position, 1) for position in range(first, first + size * world)]
    return data.batch(rows_at(step, size * world, len(data), seed)[mine], seeds[mine])


def _mixed(seed: int, number: int, kind: int = 0) -> int:
    """One seed of several numbers, the same on every machine."""
    return (seed * 2_654_435_761 + number * 40_503 + kind * 97) % 2**63


def all_batches(
    data: Data, size: int, limit: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Tensor]]:
    """The examples in order, each once, at most ``limit`` of them; every ``world``-th batch."""
    n = len(data) if limit is None else min(limit, len(data))
    for number, start in enumerate(range(0, n, size)):
        if number % world == rank:
            yield data.batch(list(range(start, min(start + size, n))))
