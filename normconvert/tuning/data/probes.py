"""The user's data as probes: a few batches to run a model on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from normconvert.tracing.probes import Probe
from normconvert.tuning.data.batches import all_batches
from normconvert.tuning.data.opening import open_data
from normconvert.tuning.data.wanted import wanted_by

if TYPE_CHECKING:
    from torch import nn

    from normconvert.sources import Source

EXAMPLES = 64
BATCH = 4


def data_probes(source: Source, data: str, model: nn.Module) -> Iterator[Probe]:
    """The first examples, without their labels.

    Args:
        source: says what its model takes.
        data: KIND:WHERE, see :func:`normconvert.tuning.data.opening.open_data`.
        model: with its weights: makes the text of ``demo:``.

    Raises:
        InputError: the data cannot be read.
    """
    examples = open_data(data, wanted_by(source, source.skeleton()), model)
    for number, batch in enumerate(all_batches(examples, BATCH, EXAMPLES)):
        yield Probe(f"data-{number}", {name: value for name, value in batch.items() if name != "labels"})
