"""What must hold before a time means anything: the numbers are right, graphs capture, the compiler finds no breaks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.benchmark.result import BOUND
from normconvert.benchmark.workloads import on_device
from normconvert.errors import in_one_line
from normconvert.tracing.output_paths import tensors_in
from tools.benchmarks.gpu.models import Versions, make, work_of
from tools.benchmarks.gpu.rows import FAILED, OK, Row
from tools.benchmarks.gpu.shapes import relative
from tools.benchmarks.gpu.tasks import Group, Setting, Task

NAME = "checks"
NUMBERS, GRAPHS, COMPILED = "numbers", "capture", "compile"
UNITS = 4.0
"""Allowed error, times the CPU's own in this dtype: kernels add up in other orders."""


def tasks(small: bool) -> tuple[list[Task], list[Task]]:
    """Toys of each architecture: what can be wrong does not need their size."""
    if small:
        return [
            Task(NAME, "gpt2", NUMBERS, 2, 8),
            Task(NAME, "gpt2", GRAPHS, 2, 8, "graphs"),
            Task(NAME, "vit-b", NUMBERS, dtype="float32"),
            Task(NAME, "vit-b", COMPILED, mode="compiled", dtype="float32"),
        ], []
    return [
        *(
            Task(NAME, subject, NUMBERS, 2, length, dtype=dtype, seconds=0.7)
            for subject, length in (("pythia-1.4b", 8), ("llama-1b", 8), ("vit-b", None), ("gpt2", 8))
            for dtype in ("float32", "float16", "bfloat16")
        ),
        Task(NAME, "gpt2", GRAPHS, 2, 8, "graphs", seconds=1.0),
        Task(NAME, "gpt2", COMPILED, 2, 8, "compiled", seconds=16.0),
    ], []


def build(task: Task, setting: Setting) -> Versions:
    """The versions of a toy."""
    return make(task, Setting(setting.device, True, setting.seconds))


def measure(versions: Versions, task: Task, setting: Setting) -> Row:
    """One check of all versions; the figures are relative errors."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    inputs = on_device(work_of(versions.skeleton, replace(task, kind="forward")).inputs, dtype, setting.device)
    figures: dict[str, float] = {}
    failures: dict[str, str] = {}
    with torch.no_grad():
        for name, model in versions.models.items():
            if name == BOUND:  # computes nonsense, quickly
                continue
            try:
                figures[name], allowed = CHECKS[task.kind](model, inputs, dtype)
            except Exception as error:  # of one version; the others are still checked
                failures[name] = in_one_line(error)
                continue
            if not figures[name] <= allowed:
                failures[name] = f"{figures[name]:.1e} off, allowed {allowed:.1e}"
    reason = "; ".join(f"{name}: {text}" for name, text in failures.items())
    return Row(NAME, task.name, task.settings, FAILED if failures else OK, reason, figures=figures, failures=failures)


def _numbers(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """The error against float64 on the CPU, and what is allowed by the CPU's own error in this dtype."""
    cpu = torch.device("cpu")
    here = copy.deepcopy(model).to(cpu)
    truth = _outputs(copy.deepcopy(here).double(), on_device(inputs, torch.float64, cpu))
    own = _error(_outputs(here, on_device(inputs, dtype, cpu)), truth)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which is no float32
        found = _outputs(model, inputs)
    return _error(found, truth), UNITS * max(own, torch.finfo(dtype).eps)


def _captured(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """The difference that a captured and replayed call makes."""
    expected = {name: value.clone() for name, value in _outputs(model, inputs).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _outputs(model, inputs)
    for value in found.values():
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return _error(found, expected), UNITS * torch.finfo(dtype).eps


def _compiled(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """The difference that compiling makes; a break is an error."""
    torch.compiler.reset()
    compiled: Any = torch.compile(model, dynamic=False, fullgraph=True)
    return _error(_outputs(compiled, inputs), _outputs(model, inputs)), UNITS * torch.finfo(dtype).eps


CHECKS = {NUMBERS: _numbers, GRAPHS: _captured, COMPILED: _compiled}


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors_in(model(**inputs)).items() if value.is_floating_point()}


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(relative(found[name], expected[name]) for name in expected)


GROUP = Group("Checks", tasks, build, measure, lambda subject: 1.0)
