"""Conversion and verification on the device beside the CPU; one call each, from a checkpoint made here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

import normconvert
from normconvert.benchmark.memory import peak_bytes
from normconvert.benchmark.timing import Spread, synchronize
from normconvert.errors import NormConvertError
from normconvert.sources.transformers_models import quiet
from tools.benchmarks.gpu.rows import FAILED, OK, Row
from tools.benchmarks.gpu.shapes import build
from tools.benchmarks.gpu.tasks import Group, Setting, Task

NAME = "conversion"
CONVERT, VERIFY, LITTLE = "convert", "verify", "verify --max-memory"
CPU, DEVICE = "cpu", "device"
GIGABYTE = 1_000_000_000
ALLOWED = 4 * GIGABYTE
"""Bytes that a verification in little memory may take beyond what this process holds already."""
WHOLE = "pythia-6.9b"
WIDTHS = f"{WHOLE}, two layers"
LAYERS = 2
"""Of 32: all of a 7B model would take the whole time. Time grows with the layers, the memory needed does not."""
SET_UP = {"gpt2": 8.0, WIDTHS: 10.0, WHOLE: 75.0}


def tasks(small: bool) -> tuple[list[Task], list[Task]]:
    """GPT-2 by both devices; the widths of a 7B model by the device, in little memory."""
    if small:
        subjects = {CONVERT: "gpt2", VERIFY: "gpt2", LITTLE: WIDTHS}
        return [Task(NAME, subject, kind, 0) for kind, subject in subjects.items()], []
    first = [
        Task(NAME, "gpt2", CONVERT, 0, seconds=22.0),
        Task(NAME, WIDTHS, LITTLE, 0, dtype="float16", seconds=18.0),
    ]
    rest = [
        Task(NAME, "gpt2", VERIFY, 0, seconds=18.0),
        Task(NAME, WHOLE, LITTLE, 0, dtype="float16", seconds=180.0),
    ]
    return first, rest


@dataclass(frozen=True)
class Checkpoint:
    """A source folder, and its conversion beside it; both go when this does."""

    holder: tempfile.TemporaryDirectory[str]

    @property
    def source(self) -> Path:
        """The original."""
        return Path(self.holder.name) / "source"

    @property
    def converted(self) -> Path:
        """By ``rmsnorm``, not verified."""
        return Path(self.holder.name) / "converted"


def make(task: Task, setting: Setting) -> Checkpoint:
    """Made on the device, saved, converted."""
    found = Checkpoint(tempfile.TemporaryDirectory(prefix="normconvert-", ignore_cleanup_errors=True))
    few = {"num_hidden_layers": LAYERS} if task.subject == WIDTHS and not setting.small else None
    name = task.subject.partition(",")[0]
    model: Any = build(name, setting.small, getattr(torch, task.dtype), setting.device, few)
    with quiet():
        model.save_pretrained(found.source, max_shard_size="2GB")
    del model
    normconvert.convert(found.source, found.converted, verify=False)
    return found


def measure(checkpoint: Checkpoint, task: Task, setting: Setting) -> Row:
    """Seconds of one call on each device; a difference that a verification finds is a failure."""
    devices = {CPU: "cpu", DEVICE: str(setting.device)} if task.kind != LITTLE else {DEVICE: str(setting.device)}
    milliseconds, peaks, figures, wrong = {}, {}, {}, []
    for name, device in devices.items():
        call = partial(CALLS[task.kind], checkpoint, device)
        milliseconds[name], peaks[name], fidelity = _timed(call, torch.device(device))
        figures[f"algebra, {name}"] = fidelity.algebra
        wrong += [f"{name}: {reason}" for reason in fidelity.reasons]
    speedup = {}
    if CPU in milliseconds:
        ratio = milliseconds[CPU].median / milliseconds[DEVICE].median
        speedup = {DEVICE: Spread(ratio, ratio, ratio)}
    return Row(
        NAME, task.name, task.settings, FAILED if wrong else OK, "; ".join(wrong), milliseconds, speedup, peaks,
        figures, rounds=1, calls=1,
    )  # fmt: skip


def _convert(checkpoint: Checkpoint, device: str) -> Any:
    """The conversion with its verification."""
    report = normconvert.convert(checkpoint.source, checkpoint.converted, device=device, overwrite=True)
    if report.fidelity is None:
        raise NormConvertError("the conversion was not verified")
    return report.fidelity


def _verify(checkpoint: Checkpoint, device: str) -> Any:
    return normconvert.verify(checkpoint.source, checkpoint.converted, device=device)


def _in_little(checkpoint: Checkpoint, device: str) -> Any:
    allowed = psutil.Process().memory_info().rss + ALLOWED
    return normconvert.verify(checkpoint.source, checkpoint.converted, device=device, max_memory=allowed)


CALLS: dict[str, Callable[[Checkpoint, str], Any]] = {CONVERT: _convert, VERIFY: _verify, LITTLE: _in_little}


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Spread, int | None, Any]:
    """Milliseconds, peak bytes by the device's own counter, and what the call returned."""
    found: list[Any] = []
    start = time.perf_counter()
    if device.type == "cuda":
        peak = peak_bytes(lambda: found.append(call()), device)
    else:
        found.append(call())
        peak = None
    synchronize(device)
    took = 1000 * (time.perf_counter() - start)
    return Spread(took, took, took), peak, found[0]


GROUP = Group("Conversion and verification", tasks, make, measure, lambda subject: SET_UP[subject])
