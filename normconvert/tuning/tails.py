"""The losses of single tokens or images, of the swapped model beside the original's: a mean hides its worst ones.

The loss of a token of a language model is the cross-entropy of its prediction, in nats; that of an image, or of any
other example with a class, that of the class. Where no class is known, the original's own decision stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normconvert.errors import NormConvertError, first_line
from normconvert.tuning.compare import IGNORED, main_output, ranks
from normconvert.tuning.data import Data, all_batches
from normconvert.tuning.processes import Processes
from normconvert.tuning.student import Batch, call, move

SHARES = {"50 %": 0.5, "99 %": 0.99, "99.9 %": 0.999, "max": 1.0}
"""Quantiles that are told: the least loss that so large a share of all losses does not exceed."""
TAIL = tuple(SHARES)[1:]
"""Those that are tails."""
LEAST = 0.1
"""Nats. An original's loss is taken for no less: below that (a probability of nine tenths) a ratio says nothing."""


class HeavyTail(NormConvertError):
    """A loss of the swapped model is further from the original's than was allowed (exit status 1)."""

    exit_status = 1


@dataclass(frozen=True)
class Tail:
    """The quantiles of the losses on one set of data.

    Attributes:
        data: what the losses are of.
        unit: what one loss is: ``nats per token`` or ``nats per example``.
        losses: how many there are.
        original: quantile, a key of :data:`SHARES` -> that of the original; infinite where a loss is no number.
        swapped: likewise, of the swapped model.
    """

    data: str
    unit: str
    losses: int
    original: dict[str, float]
    swapped: dict[str, float]

    def ratio(self, share: str) -> float:
        """How many times the original's a quantile is; one of less than :data:`LEAST` counts as that."""
        before, after = max(self.original[share], LEAST), max(self.swapped[share], LEAST)
        return 1.0 if math.isinf(before) else after / before

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data; null where a loss is no finite number."""
        ratios = {share: self.ratio(share) for share in TAIL}
        named = {"original": self.original, "swapped": self.swapped, "ratio": ratios}
        finite = {key: {s: x if math.isfinite(x) else None for s, x in row.items()} for key, row in named.items()}
        return {"data": self.data, "unit": self.unit, "losses": self.losses, **finite}

    def in_words(self) -> str:
        """``3.1 → 3.2 at 50 %, ...``: the original's and the swapped model's."""
        return ", ".join(f"{_short(self.original[s])} → {_short(self.swapped[s])} at {s}" for s in SHARES)


def _short(loss: float) -> str:
    return f"{loss:.3g}"


def tails_of(
    model: nn.Module,
    teacher: nn.Module,
    sets: Mapping[str, Data],
    processes: Processes,
    *,
    batch_size: int = 32,
    limit: int | None = 1024,
) -> tuple[tuple[Tail, ...], tuple[str, ...]]:
    """The tails of ``model`` beside those of ``teacher``.

    Args:
        model: swapped, in eval mode.
        teacher: the original.
        sets: what is measured on, by what it is called.
        processes: each takes its share of the batches.
        batch_size: examples a batch.
        limit: examples of a set at most.

    Returns:
        One for each set, and a sentence for each that could not be measured: the model cannot take it, or it gives no
        scores of classes.
    """
    found, notes = [], []
    for name, data in sets.items():
        losses: list[Tensor] = []
        why = ""
        try:
            for batch in all_batches(data, batch_size, limit, processes.rank, processes.world):
                with torch.no_grad():
                    losses.append(_losses(model, teacher, move(batch, processes.device), data))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            why = first_line(error)[:200]
        # All processes leave the set out, or those that go on would wait for the others for ever.
        if processes.mean([float(bool(why))])[0]:
            notes.append(f"no tails on {name}: {why or 'another process could not measure them'}")
            continue
        both = processes.gathered(torch.cat(losses, 1) if losses else torch.zeros(2, 0))
        if both.shape[1]:
            unit = "nats per token" if data.shifted else "nats per example"
            found.append(Tail(name, unit, both.shape[1], *(quantiles(row) for row in both)))
    return tuple(found), tuple(notes)


def quantiles(losses: Tensor) -> dict[str, float]:
    """Key of :data:`SHARES` -> that quantile of ``losses``, a vector; what is no number is larger than any."""
    ordered = torch.nan_to_num(losses.double(), nan=torch.inf, posinf=torch.inf).sort().values
    # By rank, not between two losses: with a hundred of them the 99.9th percentile is the largest.
    return {key: float(ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]) for key, share in SHARES.items()}


def _losses(model: nn.Module, teacher: nn.Module, batch: Batch, data: Data) -> Tensor:
    """(2, losses): the original's and the model's, of one batch."""
    name, expected = main_output(call(teacher, batch))
    _, found = main_output(call(model, batch))
    if not ranks(name, expected):
        raise ValueError("the model gives no scores of classes")
    mask = batch.get("attention_mask")
    if data.labelled and data.shifted:
        labels = batch["labels"][:, 1:]
        expected, found = expected[:, :-1], found[:, :-1]
    elif data.labelled and found.ndim == 2:
        labels = batch["labels"]
    else:
        labels = expected.argmax(-1)
        if mask is not None and mask.shape == labels.shape:
            labels = torch.where(mask.bool(), labels, IGNORED)
    counted = labels.flatten() != IGNORED
    rows = [F.cross_entropy(x.flatten(0, -2).float(), labels.flatten(), reduction="none") for x in (expected, found)]
    return torch.stack(rows)[:, counted].cpu()


def check_tails(tails: Sequence[Tail], most: float, then: str = "") -> None:
    """Raise HeavyTail if a tail is beyond ``most`` times the original's; the worst is named.

    Args:
        tails: of the sets that were measured.
        most: how many times the original's a tail may be.
        then: what the user can do, to end the message with.
    """
    if not tails:
        raise HeavyTail("--guard-tails: no losses could be measured, so nothing was written")
    worst = max(((tail.ratio(share), tail, share) for tail in tails for share in TAIL), key=lambda row: row[0])
    ratio, tail, share = worst
    if ratio > most:
        which = "largest loss" if share == "max" else f"{share} quantile of the losses"
        raise HeavyTail(
            f"on {tail.data} the {which} is {_short(tail.swapped[share])} {tail.unit}, {ratio:.3g} times the "
            f"original's {_short(tail.original[share])}; --guard-tails allows {most:g} times; nothing was written{then}"
        )
