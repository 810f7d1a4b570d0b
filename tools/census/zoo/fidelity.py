"""What a plan does to a model of the zoo, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.verification.algebra import algebra_model
from normconvert.verification.equivalence import changed_outputs, tolerance_for
from normconvert.verification.fidelity import is_shifted
from normconvert.verification.probe_runs import Run, in_one_basis, run_model
from normconvert.verification.run_comparison import compare_runs
from tests.support.perturb import settle

Row = dict[str, Any]

NOISE = 4.0
"""How many times as far as its own rounding a converted model may be from the original."""


def fidelity(case: Any, plan: Any) -> Row:
    """The plan on float64 copies of the weights against the original in float64.

    Outputs that the plan moves are compared without their mean, or where their basis is another not at all.
    """
    truth, probes = in_float64(case.build()), in_one_basis(verification_inputs(case.skeleton(), seed=0), plan)
    if case.batchnorms:
        settle(truth, lambda: run_model(truth, probes[:1], dtype=torch.float32))
    converted = algebra_model(truth, plan)
    expected = run_model(truth, probes, dtype=torch.float32)
    runs = [expected, run_model(converted, probes, dtype=torch.float32, like=expected)]
    shifted, left_out = changed_outputs(plan)
    compared = compare_runs(runs[0], runs[1], shifted)
    found = {key: distance for key, distance in compared.items() if not is_shifted(key[1], left_out)}
    # An output that is zero, or holds no finite number, is equal to whatever has become of it: that shows nothing.
    errors = {key: d.relative if d.size > 0 or d.difference > 0 else float("nan") for key, d in found.items()}
    tolerance = tolerance_for(plan)
    finite = [e for e in errors.values() if e == e]
    worst = max(finite, default=None)
    row: Row = {
        "error": worst,
        "tolerance": tolerance,
        "outputs": len(errors),
        "not_a_number": len(errors) - len(finite),
    }
    if worst is None:
        row["unverified"] = next(iter(runs[0].failures.values()), "no output could be compared")
    else:
        row["mismatch"] = bool(worst > tolerance)
    if row.get("mismatch"):
        row["sensitivity"] = sensitivity(truth, probes, runs[0])
        row["mismatch"] = bool(worst > NOISE * row["sensitivity"])
    if row.get("mismatch"):
        row["worst"] = [f"{probe}/{output}: {e:.1e}" for (probe, output), e in errors.items() if not e <= tolerance][:5]
    return row


def in_float64(model: Any) -> Any:
    """The model in float64, its experts by plain products: the grouped kernel takes 16- and 32-bit types only."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "batched_mm"
    return model.double()


def sensitivity(model: nn.Module, probes: Sequence[Probe], run: Run) -> float:
    """How far the outputs move, relatively, if each parameter moves to a neighbouring number: the worst of them.

    Signals and their differences grow by a factor from layer to layer in a deep network of random weights with
    BatchNorm (Yang et al. 2019, arXiv 1902.08129), so what is a rounding error in the first layer may be millions of
    times as large in the last. No other way to write the same network is nearer than that.
    """
    moved = with_neighbouring_numbers(model)
    found = compare_runs(run, run_model(moved, probes, dtype=torch.float32, like=run), frozenset())
    return max((d.relative for d in found.values() if d.size > 0), default=0.0)


def with_neighbouring_numbers(model: nn.Module) -> nn.Module:
    """A copy of a model each of whose parameters is moved by one unit, up or down, or stays."""
    generator = torch.Generator().manual_seed(0)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in filter(Tensor.is_floating_point, moved.parameters()):
            step = torch.randint(-1, 2, parameter.shape, generator=generator).to(parameter.dtype)
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * step)
    return moved
