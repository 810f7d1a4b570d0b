"""Versions of one model, measured on one workload in one mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import nn

from normconvert.benchmark.lockstep import lockstep
from normconvert.benchmark.memory import parameter_bytes, peak_bytes
from normconvert.benchmark.result import ORIGINAL, Row, row_of
from normconvert.benchmark.steps import make_step
from normconvert.benchmark.timing import Step, interleave, warm_up
from normconvert.benchmark.versions import own_memory
from normconvert.benchmark.workloads import Workload

MOVED = 1 << 32
"""Bytes of a model up to which its weights are moved: with more it takes long, and places matter less."""


def compare(
    models: Mapping[str, nn.Module],
    work: Workload,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> Row:
    """Times of all versions, interleaved.

    Args:
        models: version -> model on ``device``, in eval mode; one is ``original``.
        work: what they are asked to do.
        mode: one of :data:`normconvert.benchmark.steps.MODES`.
        dtype: of their parameters.
        device: where they are.
        seconds: to spend after the warm-up.

    Returns:
        A row; without times if the original cannot do this, with the reason.
    """
    if mode == "compiled":
        torch.compiler.reset()  # each workload is compiled for its own sizes; what piles up would be run eagerly
    steps: dict[str, Step] = {}
    peaks: dict[str, int | None] = {}
    failures: dict[str, str] = {}
    quickest = math.inf
    with torch.no_grad():
        for name, model in models.items():
            try:
                step = make_step(model, work, mode, dtype, device)
                step.prepare()
                peaks[name] = peak_bytes(step.call, device) if mode == "eager" else None
                quickest = min(quickest, warm_up(step, device, done=int(mode == "eager")))
                if mode == "compiled" and device.type == "cuda":
                    step.prepare()
                    peaks[name] = peak_bytes(step.call, device)
                steps[name] = step
            except Exception as error:  # a mode or a size that this model cannot do; the others still count
                failures[name] = why(error)
        # Every other figure is a ratio to the original: without it a row says nothing.
        if ORIGINAL not in steps:
            return Row(mode, work.kind, work.batch, work.length, failures=failures)
        chosen = {name: models[name] for name in steps}
        # Without greenlet rounds of whole calls are as fair, but noisier. On a GPU a call returns before its work is
        # done, and compiled code has no places to leave it at.
        if mode == "eager" and device.type == "cpu" and find_spec("greenlet") is not None:
            times, calls = lockstep(chosen, steps, seconds, quickest, lambda: _move(chosen))
        else:
            times, calls = interleave(steps, device, seconds, quickest)
    return row_of(mode, work.kind, work.batch, work.length, times, calls, peaks, failures)


def _move(models: Mapping[str, nn.Module]) -> None:
    """Put all weights elsewhere in memory: where they happen to lie makes a call up to a hundredth slower or faster."""
    for model in models.values():
        if parameter_bytes(model) < MOVED:
            own_memory(model)


def why(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


Progress = Callable[[str], None]
