"""The examples to learn from and those to measure on, tried on the model before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from normconvert.errors import InputError, first_line
from normconvert.tuning.compare import main_output
from normconvert.tuning.data import Data, Wanted, open_data
from normconvert.tuning.data.batches import Part
from normconvert.tuning.processes import Processes
from normconvert.tuning.settings import Settings
from normconvert.tuning.student import call, move

HELD_BACK = 0.05
"""Share of the data that is measured on and not learnt from, where there is no other."""
FEW_PASSES = 100
"""More passes over the data than this are worth a word."""


@dataclass(frozen=True)
class Examples:
    """The data of one swap.

    Attributes:
        learnt: what is learnt from.
        measured: what the figures are of; shares no example with ``learnt``, unless the user names data that does.
        notes: sentences for the user.
    """

    learnt: Data
    measured: Data
    notes: tuple[str, ...]


def open_examples(wanted: Wanted, teacher: nn.Module, settings: Settings, processes: Processes) -> Examples:
    """Open what the settings name and check it against the model.

    Args:
        wanted: the inputs that the model takes.
        teacher: the original, on the processes' device.
        settings: checked.
        processes: each takes its share of a batch.

    Raises:
        InputError: there is less than one batch, there are no labels for the task, or the model cannot take the data.
    """
    learnt, measured = _both_parts(wanted, teacher, settings)
    batch = settings.batch_size * processes.world
    if len(learnt) < batch:
        raise InputError(
            f"{settings.data}: {len(learnt)} examples to learn from are less than one batch of {batch}: "
            "give more data or a smaller --batch-size"
        )
    if settings.objective == "task" and not learnt.labelled:
        raise InputError(f"{settings.data}: --objective task needs labels, and there are none")
    notes = []
    passes = settings.steps * settings.accumulate * batch / len(learnt)
    if passes > FEW_PASSES:
        notes.append(f"little data: each of {len(learnt)} examples is seen {passes:.0f} times")
    for data in (learnt, measured):
        _try(data, teacher, processes)
    return Examples(learnt, measured, tuple(notes))


def _both_parts(wanted: Wanted, teacher: nn.Module, settings: Settings) -> tuple[Data, Data]:
    """What to learn from and what to measure on: two sets of data, or two parts of one."""
    learnt: Data = open_data(settings.data, wanted, teacher, length=settings.length)
    own = settings.eval_data or (settings.data if settings.data.startswith("demo:") else None)
    if own is not None:
        return learnt, open_data(own, wanted, teacher, length=settings.length, held_out=True)
    kept = max(1, round(len(learnt) * HELD_BACK))
    # Drawn, since the last examples of a file are often of one kind; seeded, so that a run that is resumed, and each
    # process, keeps back the same ones.
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return Part(learnt, tuple(sorted(order[kept:]))), Part(learnt, tuple(sorted(order[:kept])))


def _try(data: Data, teacher: nn.Module, processes: Processes) -> None:
    """Refuse data that the original cannot take."""
    batch = move(data.batch([0]), processes.device)
    try:
        with torch.no_grad():
            found = main_output(call(teacher, batch))[1]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as error:
        reason = first_line(error)[:200]
        raise InputError(f"{data.name}: the model cannot take this data: {reason}") from error
    labels = batch.get("labels")
    if labels is not None and not data.shifted and (found.ndim != 2 or int(labels.max()) >= found.shape[-1]):
        raise InputError(f"{data.name}: label {int(labels.max())} for a model of {found.shape[-1]} classes")
