"""The models that are measured: loaded alike, so that they differ in nothing but their norms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.memory import parameter_bytes
from normconvert.benchmark.result import BOUND, CONVERTED, ORIGINAL
from normconvert.benchmark.workloads import Workload, on_device

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan
    from normconvert.sources import Source


def versions(
    source: Source, out: str | Path | None, plan: Plan, work: Workload, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """Original, converted (if there is an ``out``) and bound, in eval mode.

    Args:
        source: the original.
        out: the converted folder.
        plan: says which norms the bound lacks.
        work: any workload: one call shows the memory layout of the norms' results.
        dtype: of all floating parameters.
        device: where they are put.
    """
    from normconvert.sources.converted import load

    models = {ORIGINAL: own_memory(source.load(dtype=dtype, device=device))}
    if out is not None:
        converted = load(out, dtype=dtype, device=device, trust_remote_code=source.trust_remote_code)
        models[CONVERTED] = own_memory(converted)
    inputs = on_device(work.inputs, dtype, device)
    models[BOUND] = without_norms(
        models[ORIGINAL], [v.path for v in plan.converted], plan.modules, lambda model: model(**inputs)
    )
    if device.type == "cpu" and 4 * parameter_bytes(models[ORIGINAL]) < psutil.virtual_memory().available:
        # Where it shares weights with the original, each finds in the cache what the other has just read.
        models[BOUND] = own_memory(copy.deepcopy(models[BOUND]))
    return models


def own_memory(model: nn.Module) -> nn.Module:
    """Give every tensor memory of its own, in place; tied ones stay one.

    Weights that are mapped from a file begin at any byte, which may make the kernels that read them slower.
    """
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        tensor.requires_grad_(False)
    return model.eval()
