"""Whole models: original, converted in three ways, and without the norms that a conversion touches (the bound)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from normconvert.benchmark import result
from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.compare import compare
from normconvert.benchmark.result import BOUND, ORIGINAL
from normconvert.benchmark.workloads import Workload, grid, on_device
from tools.benchmarks.gpu.rows import Row, measured
from tools.benchmarks.gpu.shapes import CRMSNORM, FOLDED, SHAPES, build, edited, norm_paths, plans_of
from tools.benchmarks.gpu.tasks import Group, Setting, Task

NAME = "models"
PROMPT, LONG = 128, 2048
SET_UP = {"gpt2": 7.0, "gpt2-xl": 22.0, "pythia-1.4b": 12.0, "llama-1b": 8.0, "vit-b": 5.0, "vit-l": 9.0}
"""Estimated seconds: mostly tracing and planning, on the CPU."""
COMPILING = 44.0
"""Estimated seconds to compile four versions of 12 layers."""
BILLIONS = {"gpt2": 0.16, "gpt2-xl": 1.6, "pythia-1.4b": 1.4, "llama-1b": 1.2, "vit-b": 0.09, "vit-l": 0.3}
"""Parameters."""
RATE = 3e14
"""Operations a second that a data-centre GPU does, in practice."""


def tasks(small: bool) -> tuple[list[Task], list[Task]]:
    """Those of the first eight minutes, and the rest of the product that is worth its time."""
    if small:
        return _small(), []
    first = [
        *(_task("gpt2", "decode", batch, PROMPT, "graphs") for batch in (1, 8, 64)),
        _task("gpt2", "decode", 1, PROMPT),
        *(_task("gpt2", "forward", 1, PROMPT, mode) for mode in ("graphs", "eager")),
        _task("gpt2", "forward", 64, PROMPT),
        *(_task("gpt2", "forward", 8, LONG, mode) for mode in ("eager", "compiled")),
        *(_task("vit-b", batch=1, mode=mode) for mode in ("graphs", "eager")),
        *(_task("vit-b", batch=64, mode=mode) for mode in ("eager", "compiled")),
        *(_task("gpt2-xl", "decode", batch, PROMPT, "graphs") for batch in (1, 64)),
        _task("gpt2-xl", "forward", 8, PROMPT),
        _task("gpt2-xl", "forward", 1, LONG),
        *(_task("pythia-1.4b", "decode", batch, PROMPT, "graphs") for batch in (1, 64)),
        _task("pythia-1.4b", "forward", 1, LONG),
        _task("llama-1b", "decode", 1, PROMPT, "graphs"),
        _task("llama-1b", "forward", 1, LONG),
        _task("vit-l", batch=1, mode="graphs"),
        _task("vit-l", batch=64),
        _task("gpt2", "decode", 1, PROMPT, "graphs", "float16"),
        _task("gpt2", "forward", 8, LONG, dtype="float16"),
    ]
    return first, _rest(first)


def _task(
    subject: str,
    kind: str = "forward",
    batch: int = 1,
    length: int | None = None,
    mode: str = "eager",
    dtype: str = "bfloat16",
) -> Task:
    """A task with its estimate: five versions, each called four times to warm up, and in five rounds or more."""
    tokens = batch * (1 if kind == "decode" else length or 197)
    call = 2e9 * BILLIONS[subject] * tokens / RATE
    seconds = 1.3 + 20 * call + max(1.0, 25 * call)
    if mode == "compiled":
        seconds += COMPILING * SET_UP[subject] / SET_UP["gpt2"]
    return Task(NAME, subject, kind, batch, length, mode, dtype, seconds=seconds)


def _rest(first: list[Task]) -> list[Task]:
    """All that is not among the first: by model, dtype and mode, what a model is built for together."""
    done = {task.name for task in first}
    rest: list[Task] = []
    for subject, shape in SHAPES.items():
        if subject not in SET_UP:
            continue
        works = [("forward", None)] if shape.library == "timm" else [
            ("decode", PROMPT), ("forward", PROMPT), ("forward", LONG)
        ]  # fmt: skip
        for dtype in ("bfloat16", "float16"):
            for mode in ("eager", "graphs", "compiled"):
                for kind, length in works:
                    rest += [_task(subject, kind, batch, length, mode, dtype) for batch in (1, 8, 64)]
    return [task for task in rest if task.name not in done]


def _small() -> list[Task]:
    return [
        Task(NAME, "gpt2", "decode", 1, 8),
        Task(NAME, "gpt2", "decode", 1, 8, "compiled"),
        Task(NAME, "gpt2", "decode", 1, 8, "graphs"),
        Task(NAME, "pythia-1.4b", "forward", 2, 8, dtype="float16"),
        Task(NAME, "llama-1b", "forward", 2, 8),
        Task(NAME, "vit-b", batch=2),
    ]


@dataclass(frozen=True)
class Versions:
    """The versions of one model on the device, and the model on the meta device, from which workloads are made."""

    models: dict[str, nn.Module]
    skeleton: nn.Module


def make(task: Task, setting: Setting) -> Versions:
    """Original, converted and bound."""
    meta = torch.device("meta")
    skeleton = build(task.subject, setting.small, torch.float32, meta)
    dtype: torch.dtype = getattr(torch, task.dtype)
    original = build(task.subject, setting.small, dtype, setting.device)
    plans = plans_of(task.subject, setting.small)
    models = {ORIGINAL: original, **{version: edited(original, plan) for version, plan in plans.items()}}
    plan = next(iter(plans.values()), None)
    paths = [verdict.path for verdict in plan.converted] if plan is not None else norm_paths(original)
    edits = plan.modules if plan is not None else ()
    work = next(w for w in grid(skeleton, [1], None, decode=False))
    inputs = on_device(work.inputs, dtype, setting.device)
    models[BOUND] = without_norms(original, paths, edits, lambda model: model(**inputs))
    return Versions(models, skeleton)


def work_of(skeleton: nn.Module, task: Task) -> Workload:
    """What the models of a task are asked to do."""
    lengths = None if task.length is None else [task.length]
    works = grid(skeleton, [task.batch], lengths, decode=task.kind == "decode")
    return next(work for work in works if work.kind == task.kind)


def measure(versions: Versions, task: Task, setting: Setting) -> Row:
    """All versions, interleaved; compiled all but crmsnorm, since each takes long to compile."""
    return measured(task, timed(versions.models, work_of(versions.skeleton, task), task, setting))


def timed(models: Mapping[str, nn.Module], work: Workload, task: Task, setting: Setting) -> result.Row:
    """As :func:`normconvert.benchmark.compare.compare`, by the settings of a task."""
    if task.mode == "compiled":
        left = {CRMSNORM, FOLDED, BOUND} if setting.small else {CRMSNORM}
        models = {name: model for name, model in models.items() if name not in left}
    return compare(models, work, task.mode, getattr(torch, task.dtype), setting.device, setting.seconds)


GROUP = Group("Whole models", tasks, make, measure, lambda subject: SET_UP.get(subject, 5.0))
