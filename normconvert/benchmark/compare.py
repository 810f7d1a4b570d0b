"""Versions of one model, measured on one workload in one mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from normconvert.benchmark.memory import peak_bytes
from normconvert.benchmark.result import ORIGINAL, Row, row_of
from normconvert.benchmark.steps import make_step
from normconvert.benchmark.timing import Step, interleave, warm_up
from normconvert.benchmark.workloads import Workload
from normconvert.errors import in_one_line

Turns = Callable[[Mapping[str, nn.Module], Mapping[str, Step], float, float], tuple[dict[str, list[float]], int]]
"""(models, their steps, seconds to spend, seconds of the quickest call) -> times, and calls a sample."""


def compare(
    models: Mapping[str, nn.Module],
    work: Workload,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    turns: Turns | None = None,
) -> Row:
    """Times of all versions, interleaved.

    Args:
        models: version -> model on ``device``, in eval mode; one is ``original``.
        work: what they are asked to do.
        mode: one of :data:`normconvert.benchmark.steps.MODES`.
        dtype: of their parameters.
        device: where they are.
        seconds: to spend after the warm-up.
        turns: how the versions take turns in eager mode on a CPU; None: call by call.

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
                failures[name] = in_one_line(error)
        # Every other figure is a ratio to the original: without it a row says nothing.
        if ORIGINAL not in steps:
            return Row(mode, work.kind, work.batch, work.length, failures=failures)
        if turns is not None and mode == "eager" and device.type == "cpu":
            times, calls = turns({name: models[name] for name in steps}, steps, seconds, quickest)
        else:
            times, calls = interleave(steps, device, seconds, quickest)
    return row_of(mode, work.kind, work.batch, work.length, times, calls, peaks, failures)


Progress = Callable[[str], None]
