"""Inputs for a model that nobody described: to trace it with, and to compare two of its versions on.

They are guessed from ``forward``'s signature, ``main_input_name`` and the config, by a table from argument name to
builder (:mod:`normconvert.probes.builders`); no model is named anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from normconvert.probes.choose import on_meta, ranked
from normconvert.probes.verification import Probe, verification_inputs

__all__ = ["Probe", "trace_inputs", "trace_inputs_candidates", "verification_inputs"]


def trace_inputs_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments on the meta device to try in turn, the likely first; at most a few.

    Args:
        model: a transformers or timm model on the meta device. ``config.use_cache`` is set to False on it.

    Raises:
        TraceError: a required argument of ``forward`` has no row in the table.
    """
    for guess, _ in ranked(model):
        yield on_meta(model, guess.specs)


def trace_inputs(model: nn.Module) -> dict[str, Any]:
    """The first of :func:`trace_inputs_candidates` that the model's forward takes (tried in torch's fake mode).

    Where every guess is stopped only by a value that tracing does not know, the first such; else the first of all.

    Raises:
        TraceError: a required argument of ``forward`` has no row in the table.
    """
    guess, _ = next(ranked(model))
    return on_meta(model, guess.specs)
