"""BatchNorm networks: original, fused, fused by torch.fx and without norms, in the usual layout and channels last."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.benchmark.compare import compare
from normconvert.benchmark.workloads import grid
from tools.benchmarks import fuse as bench_fuse
from tools.benchmarks.gpu.rows import Row, measured
from tools.benchmarks.gpu.tasks import Group, Setting, Task

NAME = "fuse-bn"
LAST = "channels-last"
SET_UP = {"resnet50": 5.0, "mobilenetv3_large_100": 6.0, "regnety_016": 8.0, "levit_128": 8.0, "densenet121": 10.0}


def tasks(small: bool) -> tuple[list[Task], list[Task]]:
    """One picture in a CUDA graph, sixty-four in both layouts."""
    if small:
        return [Task(NAME, "test_resnet", layout=layout, dtype="float32") for layout in ("", LAST)], []
    first = [
        task
        for name in bench_fuse.MODELS
        for task in (
            Task(NAME, name, batch=1, mode="graphs", seconds=1.5),
            Task(NAME, name, batch=64, seconds=1.5),
            Task(NAME, name, batch=64, layout=LAST, seconds=1.5),
        )
    ]
    rest = [
        Task(NAME, name, batch=batch, layout=LAST, mode=mode, dtype=dtype, seconds=seconds)
        for name in bench_fuse.MODELS
        for dtype in ("float16", "float32")
        for batch, mode, seconds in ((1, "graphs", 2.0), (64, "eager", 2.0), (64, "compiled", 60.0))
    ]
    return first, rest


@dataclass
class Networks:
    """The versions of a network by layout, made when a task asks for them, and one picture as it takes them."""

    models: dict[str, nn.Module]
    skeleton: nn.Module
    last: dict[str, nn.Module] = field(default_factory=dict)

    def of(self, layout: str) -> dict[str, nn.Module]:
        """The versions in one layout."""
        if layout != LAST:
            return self.models
        if not self.last:
            formats: Any = {"memory_format": torch.channels_last}
            self.last = {name: copy.deepcopy(model).to(**formats) for name, model in self.models.items()}
        return self.last


def make(task: Task, setting: Setting) -> Networks:
    """All versions in the dtype of the task."""
    models, _, _ = bench_fuse.versions(task.subject, setting.device)
    dtype: torch.dtype = getattr(torch, task.dtype)
    with torch.device("meta"):
        skeleton = bench_fuse.build(task.subject)
    return Networks({name: model.to(dtype) for name, model in models.items()}, skeleton)


def measure(networks: Networks, task: Task, setting: Setting) -> Row:
    """All versions, interleaved."""
    work = grid(networks.skeleton, [task.batch])[0]
    if task.layout == LAST:
        work = replace(work, inputs={name: _last(value) for name, value in work.inputs.items()})
    dtype: torch.dtype = getattr(torch, task.dtype)
    models = networks.of(task.layout)
    return measured(task, compare(models, work, task.mode, dtype, setting.device, setting.seconds))


def _last(value: Any) -> Any:
    return value.to(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.ndim == 4 else value


GROUP = Group("BatchNorm networks", tasks, make, measure, lambda subject: SET_UP.get(subject, 6.0))
