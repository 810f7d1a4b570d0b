"""Norms swapped for UN and RepBN and fused away, beside the original: time and peak memory, the papers' claims."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.result import BOUND, ORIGINAL
from normconvert.benchmark.workloads import grid, on_device
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.runtime import apply_module_edits
from normconvert.tracing.model_graph import trace_model
from normconvert.tuning.sites import find_sites
from normconvert.tuning.student import Student, finish, make_student, make_teacher
from normconvert.tuning.student import measure as moments_of
from normconvert.tuning.writing import plan_of
from tools.benchmarks.gpu.models import PROMPT, Versions, timed, work_of
from tools.benchmarks.gpu.rows import Row, measured
from tools.benchmarks.gpu.shapes import SHAPES, build, edited
from tools.benchmarks.gpu.tasks import Group, Setting, Task

NAME = "swap"
METHODS = ("un", "repbn")
SET_UP = 14.0


def tasks(small: bool) -> tuple[list[Task], list[Task]]:
    """Pictures and prompts: eagerly, which tells the memory, and in CUDA graphs."""
    if small:
        return [Task(NAME, "vit-b", batch=2), Task(NAME, "gpt2", "decode", 2, 8)], []
    first = [
        Task(NAME, "vit-b", batch=1, mode="graphs"),
        Task(NAME, "vit-b", batch=64),
        Task(NAME, "gpt2", "forward", 1, PROMPT, "graphs"),
        Task(NAME, "gpt2", "forward", 64, PROMPT),
    ]
    rest = [
        *(Task(NAME, "vit-b", batch=batch, dtype=dtype, mode=mode, seconds=seconds)
          for dtype in ("float16", "float32") for batch, mode, seconds in ((1, "eager", 2.0), (64, "eager", 3.0),
                                                                          (64, "compiled", 50.0))),
        Task(NAME, "gpt2", "decode", 1, PROMPT, "graphs"),
        Task(NAME, "gpt2", "decode", 64, PROMPT, "graphs"),
        Task(NAME, "gpt2", "forward", 64, PROMPT, "compiled", seconds=60.0),
    ]  # fmt: skip
    return first, rest


def make(task: Task, setting: Setting) -> Versions:
    """Original, swapped and fused by each method, and bound. An embedding that is the head, too, is made two."""
    changes = {"tie_word_embeddings": False} if SHAPES[task.subject].library == "transformers" else {}
    meta, dtype = torch.device("meta"), getattr(torch, task.dtype)

    def skeleton() -> nn.Module:
        return build(task.subject, setting.small, torch.float32, meta, changes)

    original = build(task.subject, setting.small, dtype, setting.device, changes)
    traced = skeleton()
    graph = trace_model(traced)
    plan = plan_rmsnorm(graph, Options())
    sites = find_sites(graph, plan)
    work = grid(traced, [2], None, decode=False)[0]
    models = {ORIGINAL: original}
    teacher = make_teacher(copy.deepcopy(original).double(), plan, torch.float32)
    moments = moments_of(teacher, sites, iter([on_device(work.inputs, torch.float32, setting.device)]))
    fusing: Plan | None = None
    for method in METHODS:
        student = make_student(teacher, plan, sites, method)
        for path, found in moments.items():
            student.norms[path].calibrate(found)
        finish(student)
        if fusing is None:
            edits = plan_of(student, plan, method).modules
            shape = skeleton()
            apply_module_edits(shape, edits)
            fusing = plan_model(shape, Options(), "fuse-bn")
        models[method] = edited(_as_affine(student, edits), fusing).to(dtype)
    inputs = on_device(work.inputs, dtype, setting.device)
    models[BOUND] = without_norms(original, [site.path for site in sites], (), lambda model: model(**inputs))
    return Versions(models, traced)


def _as_affine(student: Student, edits: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The finished student with an affine map at each of its norms."""
    model = student.model
    maps = {path: norm.affine() for path, norm in student.norms.items()}
    for path, site in zip(student.norms, student.sites, strict=True):
        parent, _, leaf = path.rpartition(".")
        device = next(model.parameters()).device
        setattr(model.get_submodule(parent), leaf, nn.LayerNorm(site.size, device=device))
    apply_module_edits(model, [edit for edit in edits if edit["op"] == "affine"])
    for path, site in zip(student.norms, student.sites, strict=True):
        module: Any = model.get_submodule(path)
        for name, value in zip((site.weight or "weight", site.bias or "bias"), maps[path], strict=True):
            getattr(module, name).data = value.float()
    return model.requires_grad_(False)


def measure(versions: Versions, task: Task, setting: Setting) -> Row:
    """All versions, interleaved."""
    return measured(task, timed(versions.models, work_of(versions.skeleton, task), task, setting))


GROUP = Group("Swapped norms", tasks, make, measure, lambda subject: SET_UP)
