"""Models made and run for the verification: the plan replayed in float64, and all probes through one model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.probes import Probe
from normconvert.verification.fidelity import Outputs, flatten
from normconvert.verification.lazy_weights import LazyWeight, in_turns

Told = Callable[[str], None]


@dataclass
class Run:
    """One model's outputs on all probes.

    Attributes:
        outputs: probe -> its outputs.
        failures: probe -> why it could not be run.
        constants: probe -> the dtype that constants had which the model made while it ran.
    """

    outputs: dict[str, Outputs] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    constants: dict[str, torch.dtype] = field(default_factory=dict)


def algebra_model(
    truth: nn.Module, plan: Plan, *, share: bool = False, seen: Callable[[str, Tensor], None] | None = None
) -> nn.Module:
    """A copy of the float64 model with the plan's tensor edits and module edits applied.

    Args:
        truth: the original in float64; unchanged. Edits look up *its* tensors, so that their order does not matter.
        plan: names of tensors as in ``truth.state_dict()``.
        share: parameters that the plan leaves as they are stay those of `truth` itself, in no memory of their own.
        seen: called with each edited tensor.

    Raises:
        InputError: the plan names a tensor or a module that the model does not have, or one of another shape.
    """
    from normconvert.runtime import apply_module_edits

    source = named_tensors(truth)
    changed = {id(source[name]) for name in plan.tensors if name in source}
    model = copy_model(truth, [p for p in truth.parameters() if id(p) not in changed] if share else [])
    try:
        apply_module_edits(model, plan.modules)
    except (ValueError, AttributeError) as error:
        raise InputError(f"the plan does not fit the model: {error}") from error

    def lookup(name: str) -> Tensor:
        if name not in source:
            raise InputError(
                f"the plan names the tensor {name!r}, which the model does not have: is it another model's?"
            )
        return source[name]

    target = named_tensors(model)
    for name, edits in plan.tensors.items():
        untied = bool(edits) and edits[0]["op"] == "copy"
        made = untied or (bool(edits) and edits[0]["op"] == "new")
        old = source[name] if name in source else (torch.empty(0) if made else lookup(name))
        try:
            value = apply_edits(old, edits, lookup).to(old.device)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"the plan does not fit the tensor {name!r}: {error}") from error
        if seen is not None:
            seen(name, value)
        if untied or name not in target:
            _set_parameter(model, name, value)
        else:
            target[name].data = value  # the shared Parameter itself: every name that is tied to it sees the edit
    return model.eval()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the name a Parameter of its own."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def run_model(
    model: nn.Module,
    probes: Iterable[Probe],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    like: Run | None = None,
    told: Told | None = None,
) -> Run:
    """All probes through a model, in eval mode and without gradients.

    In float64 the constants that a model makes while it runs have float64's range, if it runs so: some masks hold the
    largest number of the model's dtype. Other models mix constants with what they cast to float32.

    Args:
        model: on any device, any floating dtype.
        probes: CPU inputs; floating ones are rounded to `dtype` first, so that every model sees the same values.
        dtype: that of the checkpoint under test.
        seed: for models that draw random numbers even in eval mode.
        like: the run of the model that this one is held against: each probe is run as it was there, or fails.
        told: called with the name of each probe as its run begins.
    """
    model.eval()
    sample = next(iter(model.parameters()), torch.empty(0))
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    plain_experts(model)
    probes, run = list(probes), Run()

    lazy = any(isinstance(p, LazyWeight) for p in model.parameters())
    usual = torch.get_default_dtype()
    # Calls that take turns share one default dtype.
    shared = torch.float64 if own == torch.float64 else usual

    def one(probe: Probe) -> Outputs | str:
        if told is not None:
            told(probe.name)
        inputs = {name: cast(value, dtype, own, sample.device) for name, value in probe.inputs.items()}
        tried = [like.constants[probe.name]] if like and probe.name in like.constants else [shared, usual]
        try:
            output, run.constants[probe.name] = (
                (_seeded(model, inputs, seed), shared) if lazy else _run(model, inputs, tried, seed)
            )
        except InputError:  # of a weight that is read while the model runs
            raise
        except Exception as error:  # a probe that the original cannot take is skipped, with its reason
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        return {name: value.cpu() for name, value in flatten(output).items()}

    calls = [partial(one, probe) for probe in probes]
    with default_dtype(shared if lazy else usual):
        for probe, result in zip(probes, in_turns(calls) if lazy else (call() for call in calls), strict=True):
            if isinstance(result, str):
                run.failures[probe.name] = result
            else:
                run.outputs[probe.name] = result
    return run


def _run(
    model: nn.Module, inputs: dict[str, Any], constants: Sequence[torch.dtype], seed: int
) -> tuple[Any, torch.dtype]:
    """One call, with the first of the dtypes for constants that the model runs with, and which that is."""
    for dtype in dict.fromkeys(constants[:-1]):
        with default_dtype(dtype), contextlib.suppress(RuntimeError, TypeError):
            return _seeded(model, inputs, seed), dtype
    with default_dtype(constants[-1]):
        return _seeded(model, inputs, seed), constants[-1]


def _seeded(model: nn.Module, inputs: dict[str, Any], seed: int) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(**inputs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Constants that models make have this dtype within."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def plain_experts(model: nn.Module) -> None:
    """Have experts computed by plain products if the model is in float64: the grouped kernel has no such type."""
    if next((p.dtype for p in model.parameters() if p.is_floating_point()), None) != torch.float64:
        return
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "batched_mm"


def cast(value: Any, through: torch.dtype, to: torch.dtype, device: torch.device) -> Any:
    """A probe's value as a model of dtype `to` takes it: rounded to `through` first, on the model's device."""
    if not isinstance(value, Tensor):
        return value
    return value.to(through).to(to).to(device) if value.is_floating_point() else value.to(device)
