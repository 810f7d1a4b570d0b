"""All probes through one model, as the verification runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.compat import transformers as compat
from normconvert.compat.torch import pytree
from normconvert.errors import InputError, in_one_line
from normconvert.plan.conversion_plan import Plan
from normconvert.runtime import process_lock
from normconvert.tracing.output_paths import tensors_in
from normconvert.tracing.probes import Probe
from normconvert.tracing.probes.choose import floating_dtype
from normconvert.verification.fidelity import Outputs
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
    probes, run = list(probes), Run()
    prepare(model)
    lazy = any(isinstance(p, LazyWeight) for p in model.parameters())
    first, *others = constant_dtypes(model)

    def one(probe: Probe) -> Outputs | str:
        if told is not None:
            told(probe.name)
        inputs = inputs_of(probe, dtype, model)
        known = like.constants.get(probe.name) if like is not None else None
        try:
            # Calls that take turns share one default dtype.
            tried = [first] if lazy else [known] if known else [first, *others]
            for constants in tried[:-1]:
                with contextlib.suppress(RuntimeError, TypeError):
                    output = run_once(model, inputs, constants, seed)
                    break
            else:
                constants = tried[-1]
                output = _seeded(model, inputs, seed) if lazy else run_once(model, inputs, constants, seed)
        except InputError:  # of a weight that is read while the model runs
            raise
        except Exception as error:  # a probe that the original cannot take is skipped, with its reason
            return in_one_line(error)
        run.constants[probe.name] = constants
        return {name: value.cpu() for name, value in tensors_in(output).items()}

    calls = [partial(one, probe) for probe in probes]
    with default_dtype(first) if lazy else nullcontext():
        for probe, result in zip(probes, in_turns(calls) if lazy else (make() for make in calls), strict=True):
            if isinstance(result, str):
                run.failures[probe.name] = result
            else:
                run.outputs[probe.name] = result
    return run


def in_one_basis(probes: Sequence[Probe], plan: Plan | None) -> list[Probe]:
    """The probes without embeddings from outside which the converted model takes in another basis, or without mean.

    A door that is not proved may be a flag as well, and a probe that has it off goes through no door.
    """
    moved = plan is not None and (plan.method in ("rotate", "scale") or plan.native)
    doors = plan.untraced_doors if plan is not None and moved else ()
    return [probe for probe in probes if not any(_has_values(probe.inputs.get(door)) for door in doors)]


def _has_values(value: Any) -> bool:
    """Whether an input is, or holds, a floating tensor."""
    leaves = pytree.tree_leaves(value)
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)


def constant_dtypes(model: nn.Module) -> list[torch.dtype]:
    """What constants may be while the model runs, to be tried in turn: float64's own for it, and the default."""
    usual = torch.get_default_dtype()
    return list(dict.fromkeys([torch.float64 if floating_dtype(model) == torch.float64 else usual, usual]))


def run_once(model: nn.Module, inputs: Mapping[str, Any], constants: torch.dtype, seed: int = 0) -> Any:
    """What the model returns: without gradients, its random numbers from ``seed``, its constants of one dtype."""
    with default_dtype(constants):
        return _seeded(model, inputs, seed)


def _seeded(model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(**inputs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Constants that models make have this dtype within, in the whole process: one thread at a time."""
    with process_lock():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def prepare(model: nn.Module) -> None:
    """Put a model into the state in which all are compared: eval mode, and see :func:`plain_experts`."""
    plain_experts(model.eval())


def plain_experts(model: nn.Module) -> None:
    """Have experts computed by plain products if the model is in float64: the grouped kernel has no such type."""
    if floating_dtype(model) != torch.float64:
        return
    for module in model.modules():
        compat.plain_experts(getattr(module, "config", None))


def inputs_of(probe: Probe, through: torch.dtype, model: nn.Module) -> dict[str, Any]:
    """A probe's inputs as the model takes them: floating ones rounded to `through` first, all on the model's device."""
    device = next(iter(model.parameters()), torch.empty(0)).device
    return {name: cast(value, through, floating_dtype(model), device) for name, value in probe.inputs.items()}


def cast(value: Any, through: torch.dtype, to: torch.dtype, device: torch.device) -> Any:
    """A probe's value as a model of dtype `to` takes it: rounded to `through` first, on the model's device."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(through).to(to).to(device) if leaf.is_floating_point() else leaf.to(device)

    return pytree.tree_map(one, value)
