"""The norm by itself, by size and dtype: torch's kernels, the formula compiled, liger-kernel's; after an addition, too.

A call is :data:`REPEAT` norms in a row, and the times are those of one: replaying a graph of a single kernel would
measure the replaying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.benchmark.compare import compare
from normconvert.benchmark.result import ORIGINAL
from normconvert.benchmark.workloads import Workload
from normconvert.runtime import RMSNorm
from tools.benchmarks.gpu.rows import Row, measured
from tools.benchmarks.gpu.tasks import Group, Setting, Task

NAME = "norm"
PLAIN, ADDED = "norm", "add+norm"
REPEAT = 16
EPS = 1e-5
Norm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, residual) -> the norm's result and the stream after it: x itself, or x + residual."""


def tasks(small: bool) -> tuple[list[Task], list[Task]]:
    """Widths of the models that are measured; one token, a batch of them, a prompt. ``batch`` counts tokens."""
    if small:
        return [Task(NAME, "256", kind, 512, seconds=0.1) for kind in (PLAIN, ADDED)], []

    def rows(widths: tuple[int, ...], tokens: tuple[int, ...], mode: str, dtype: str) -> Iterator[Task]:
        for width in widths:
            for kind in (PLAIN, ADDED):
                for count in tokens:
                    yield Task(NAME, str(width), kind, count, None, mode, dtype, seconds=2.3)

    first = [*rows((768, 2048), (1, 2048), "graphs", "bfloat16")]
    rest = [
        *rows((768, 2048), (64, 16384), "graphs", "bfloat16"),
        *rows((768, 2048), (1, 64, 2048, 16384), "eager", "bfloat16"),
        *rows((1024, 1600, 4096, 8192), (1, 64, 2048, 16384), "graphs", "bfloat16"),
        *rows((768, 2048, 4096), (1, 64, 2048, 16384), "graphs", "float16"),
        *rows((768, 2048, 4096), (1, 64, 2048, 16384), "graphs", "float32"),
    ]
    return first, rest


class Repeated(nn.Module):
    """One way to compute the norm, several times in a row."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The last result."""
        y = x
        for _ in range(REPEAT):
            y, _ = self.norm(x, residual)
        return y


@dataclass(frozen=True)
class Parameters:
    """Weight and bias of one width."""

    weight: Tensor
    bias: Tensor


def make(task: Task, setting: Setting) -> Parameters:
    """Random parameters."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    weight, bias = torch.randn(2, int(task.subject), device=setting.device, dtype=dtype).unbind()
    return Parameters(weight.contiguous(), bias.contiguous())


def ways(parameters: Parameters, added: bool) -> dict[str, nn.Module]:
    """All that compute the norm of x, or of x + residual, which they give as well. LayerNorm is the original."""
    weight, bias, shape = parameters.weight, parameters.bias, (parameters.weight.numel(),)

    def own(norm_bias: Tensor | None) -> RMSNorm:
        held = nn.Parameter(norm_bias, requires_grad=False) if norm_bias is not None else None
        own_weight = nn.Parameter(weight, requires_grad=False)
        return RMSNorm(shape[0], EPS, weight=own_weight, bias=held).eval()

    def formula(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)

    single: dict[str, Callable[[Tensor], Tensor]] = {
        ORIGINAL: lambda x: F.layer_norm(x, shape, weight, bias, EPS),
        "layer_norm, no bias": lambda x: F.layer_norm(x, shape, weight, None, EPS),
        "rms_norm": lambda x: F.rms_norm(x, shape, weight, EPS),
        "rms_norm + bias": lambda x: F.rms_norm(x, shape, weight, EPS) + bias,
        "module": own(None),
        "module with bias": own(bias),
    }
    found: dict[str, Norm] = {name: _after(norm, added) for name, norm in single.items()}
    found["formula compiled"] = torch.compile(_after(formula, added), dynamic=False)
    found["formula + bias compiled"] = torch.compile(_after(lambda x: formula(x) + bias, added), dynamic=False)
    if find_spec("liger_kernel") is not None:
        found["liger"] = _liger(weight, added)
    return {name: Repeated(norm) for name, norm in found.items()}


def _after(norm: Callable[[Tensor], Tensor], added: bool) -> Norm:
    """The norm of the sum, if there is an addition before it, else of the input."""

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + residual if added else x
        return norm(stream), stream

    return call


def _liger(weight: Tensor, added: bool) -> Norm:
    """liger-kernel's RMSNorm, fused with the addition where there is one."""
    library: Any = import_module("liger_kernel.transformers.functional")

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if added:
            y, stream = library.liger_fused_add_rms_norm(x, residual, weight, EPS)
            return y, stream
        return library.liger_rms_norm(x, weight, EPS), x

    return call


def measure(parameters: Parameters, task: Task, setting: Setting) -> Row:
    """All ways, interleaved."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    x, residual = torch.randn(2, task.batch, int(task.subject)).unbind()
    x = x - x.mean(-1, keepdim=True)
    work = Workload("forward", task.batch, None, {"x": x, "residual": residual - residual.mean(-1, keepdim=True)})
    models = ways(parameters, task.kind == ADDED)
    torch.compiler.reset()
    row = measured(task, compare(models, work, task.mode, dtype, setting.device, setting.seconds / 2), 1 / REPEAT)
    missing = {"liger": "liger-kernel is not installed"} if "liger" not in models else {}
    return replace(row, failures={**row.failures, **missing})


GROUP = Group("The norm's kernels", tasks, make, measure, lambda subject: 0.5)
