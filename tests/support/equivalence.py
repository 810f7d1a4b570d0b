"""Is a plan right? The one question that soundness tests ask, of any network that can be built twice.

A plan is right if the float64 network with the plan applied computes what the original computes, if that still holds
with the LayerNorms left in place (invariant I3), if every converted norm is an RMSNorm which reads mean-free values,
and if no tensor changed its name or shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.runtime import RMSNorm
from normconvert.tracing.graph import trace
from normconvert.tracing.probes import Probe
from normconvert.verification.algebra import algebra_model
from normconvert.verification.probe_runs import run_model
from normconvert.verification.run_comparison import compare_runs

Inputs = Mapping[str, Tensor]
TOLERANCE = 1e-10
MEAN_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What became of a network: its plan (None if it could not be traced), and what is wrong with it."""

    plan: Plan | None
    problems: tuple[str, ...] = ()


def randomise(model: nn.Module, seed: int) -> None:
    """Weights that hide nothing: gains 1 + 0.3 n, everything else normal, matrices by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    norms = {
        id(m.weight) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) and m.weight is not None
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if id(p) in norms or name.endswith("gain"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise * (0.5 if p.ndim < 2 else max(p[0].numel(), 1) ** -0.5))


def on_meta(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value.to("meta") for name, value in inputs.items()}


def run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs by name; a tensor is ``output``, a tuple is numbered."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: Any = model(**{name: value.clone() for name, value in inputs.items()})
    if isinstance(found, Tensor):
        return {"output": found}
    return dict(found) if isinstance(found, dict) else {str(i): value for i, value in enumerate(found)}


def check(
    make: Callable[[], nn.Module],
    inputs: Sequence[Inputs],
    options: Options | None = None,
    *,
    seed: int = 0,
    axes: Mapping[str, int] | None = None,
) -> Outcome:
    """Trace, plan, apply and compare.

    Args:
        make: builds the network, float64 by default dtype, on the default device.
        inputs: what to compare on; the first is also traced.
        options: of the plan.
        seed: of the weights.
        axes: channel axis of returned streams, by output; -1 where not named.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            skeleton = make().eval()
        try:
            plan = plan_rmsnorm(trace(skeleton, on_meta(inputs[0])), options or Options())
        except TraceError as error:
            return Outcome(None, (f"not traced: {error}",))
        truth = make().eval()
        randomise(truth, seed)
        return Outcome(plan, tuple(_problems(truth, plan, inputs, axes or {})))
    finally:
        torch.set_default_dtype(torch.float32)


def _problems(truth: nn.Module, plan: Plan, inputs: Sequence[Inputs], axes: Mapping[str, int]) -> list[str]:
    problems = []
    converted = algebra_model(truth, plan)
    kept = algebra_model(truth, replace(plan, modules=[m for m in plan.modules if m["op"] != "replace"]))
    if {k: v.shape for k, v in truth.state_dict().items()} != {k: v.shape for k, v in converted.state_dict().items()}:
        problems.append("the names or shapes of the tensors changed")
    shifted = set(plan.shifted_outputs)
    means: dict[str, float] = {}
    for verdict in plan.converted:
        norm = converted.get_submodule(verdict.path)
        if type(norm) is not RMSNorm:
            problems.append(f"{verdict.path} is said to be converted but is a {type(norm).__name__}")
        norm.register_forward_pre_hook(_watch(means, verdict.path))
    for number, one in enumerate(inputs):
        expected = run(truth, one)
        for label, model in (("converted", converted), ("with its LayerNorms kept", kept)):
            found = run(model, one)
            for name, value in expected.items():
                error = distance(found[name], value, axes.get(name, -1) if name in shifted else None)
                if not error <= TOLERANCE:
                    problems.append(f"input {number}: {name} of the model {label} is off by {error:.2g}")
    problems += [f"{path} reads a mean of {m:.2g} of the rms" for path, m in means.items() if not m <= MEAN_TOLERANCE]
    return problems


def differences(truth: nn.Module, edited: nn.Module, inputs: Sequence[Inputs]) -> list[str]:
    """The outputs in which two models differ, in words."""
    found = []
    for number, one in enumerate(inputs):
        expected, outputs = run(truth, one), run(edited, one)
        for name, value in expected.items():
            error = distance(outputs[name], value)
            if not error <= TOLERANCE:
                found.append(f"input {number}: {name} is off by {error:.2g}")
    return found


def _watch(means: dict[str, float], path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        axis = module.axis
        assert isinstance(axis, int)
        ratio = x.mean(axis).abs() / (x.square().mean(axis).sqrt() + 1e-4)
        means[path] = max(means.get(path, 0.0), float(ratio.max()))

    return hook


def distance(found: Tensor, expected: Tensor, axis: int | None = None) -> float:
    """The relative error; with ``axis`` given, of the parts orthogonal to the constants along it."""
    if found.shape != expected.shape:
        return float("inf")
    a, b = found.detach().double(), expected.detach().double()
    if axis is not None:
        a, b = a - a.mean(axis, keepdim=True), b - b.mean(axis, keepdim=True)
    if not bool(torch.isfinite(b).all()):
        return 0.0 if bool(torch.equal(a.isnan(), b.isnan())) else float("inf")
    return float((a - b).norm()) / max(float(b.norm()), 1e-6)


def computed(module: nn.Module, x: Tensor, mode: str) -> Tensor:
    """What a module gives: ``eager``, under ``autograd``, ``compiled`` or ``exported``."""
    run: Any = module
    if mode == "compiled":
        run = torch.compile(module, fullgraph=True, backend="eager")
    if mode == "exported":
        run = torch.export.export(module, (x,), strict=False).module()
    with torch.set_grad_enabled(mode == "autograd"):
        result: Tensor = run(x)
    torch.compiler.reset()
    return result


def compare_models(
    original: nn.Module, converted: nn.Module, probes: Sequence[Probe], *, outputs_shift_allowed: bool = False
) -> dict[tuple[str, str], float]:
    """Relative errors of every output of every probe that the original can run, {(probe, output): ||y'-y|| / ||y||}.

    With ``outputs_shift_allowed`` all outputs are compared without their per-token mean over the channels.
    """
    expected = run_model(original, probes, dtype=torch.float32)
    found = run_model(converted, probes, dtype=torch.float32, like=expected)
    names = {name for outputs in expected.outputs.values() for name in outputs}
    shifted = frozenset(names if outputs_shift_allowed else ())
    return {key: d.relative for key, d in compare_runs(expected, found, shifted).items()}
