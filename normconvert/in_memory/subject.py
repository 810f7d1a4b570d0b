"""A model in memory that can be converted, its skeleton, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.in_memory.caches import Cache, caches_of
from normconvert.option_fields import is_model
from normconvert.tracing.calls import Call, calls_of
from normconvert.tracing.graph import Graph
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.model_graph import trace_calls, trace_model
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.tracing.probes.choose import floating_dtype, is_timm
from normconvert.tracing.probes.examples import example_probes
from normconvert.tracing.skeleton import skeleton_of
from normconvert.verification.algebra import named_tensors
from normconvert.verification.probe_runs import inputs_of


@dataclass(frozen=True)
class Subject:
    """A model in memory.

    Attributes:
        model: the user's own; nothing here changes it.
        skeleton: a copy without weights, on the meta device, in eval mode.
        calls: how it is called; empty where the library's models need no example.
        library: ``transformers``, ``timm`` or ``torch``.
        caches: what its modules keep of earlier runs; copies are without.
    """

    model: nn.Module
    skeleton: nn.Module
    calls: tuple[Call, ...]
    library: str
    caches: tuple[Cache, ...] = ()

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def tracer(self) -> Callable[[nn.Module], Graph]:
        """How the skeleton becomes a graph."""
        if not self.calls:
            return trace_model
        return lambda model: trace_calls(model, self.calls, doors=self.library != "torch")

    def probes(self, level: str, seed: int = 0) -> list[Probe]:
        """Inputs for the verification."""
        if not self.calls:
            return verification_inputs(self.skeleton, seed=seed, level=level)
        return example_probes(self.calls, seed=seed, level=level)

    def copy(self) -> nn.Module:
        """The model once more, as if it had not run."""
        return self.forgetful(copy_model(self.model))

    def forgetful(self, model: nn.Module) -> nn.Module:
        """``model``, this one or a copy, without what it keeps of earlier runs."""
        for cache in self.caches:
            cache.forget(model)
        return model

    def in_float64(self, model: nn.Module | None = None) -> nn.Module:
        """A copy of the model (or of an edited copy) with all its floating tensors in float64."""
        made = copy_model(model) if model is not None else self.copy()
        if any(tensor.device.type == "mps" for tensor in made.parameters()):  # which has no float64
            made = made.cpu()
        made = made.double()
        for holder in made.modules():
            for name, value in vars(holder).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    setattr(holder, name, value.double())
        return made


def subject_of(model: Any, example_inputs: Any, what: str = "model") -> Subject:
    """Check a model, and take its skeleton.

    Args:
        model: from the user.
        example_inputs: see :func:`normconvert.tracing.calls.calls_of`; None for models whose inputs are known.
        what: the argument's name, for errors.

    Raises:
        InputError: it is no model, or one that cannot be converted in memory, or its inputs are not known.
    """
    if not is_model(model):
        raise InputError(
            f"{what}: found {type(model).__name__}, expected a torch.nn.Module; normconvert.convert takes checkpoints"
        )
    library = library_of(model)
    if example_inputs is None and library == "torch":
        raise InputError(
            f"{type(model).__name__} is a model of neither transformers nor timm: say how it is called, "
            "example_inputs=(x,) or example_inputs={'x': x}"
        )
    _refuse(model)
    calls = () if example_inputs is None else calls_of(model, example_inputs)
    subject = Subject(model, skeleton_of(model), calls, library)
    # As it is used: some keep a value in eval mode only.
    first = subject.probes("quick")[0]
    caches = tuple(caches_of(model, inputs_of(first, floating_dtype(model), model)))
    subject = replace(subject, caches=caches)
    subject.forgetful(subject.skeleton)
    return subject


def library_of(model: nn.Module) -> str:
    """``transformers`` or ``timm``, whose models tell their inputs; ``torch`` for all others."""
    if is_timm(model):
        return "timm"
    return "transformers" if hasattr(model, "main_input_name") and hasattr(model, "config") else "torch"


def _refuse(model: nn.Module) -> None:
    """Refuse what is no plain module with its weights in one place.

    Raises:
        InputError: says what it is, and what to give instead.
    """
    name = type(model).__name__
    if name in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):  # compiled, or replicated
        raise InputError(f"{name} wraps a model: give the model that it was made of, and wrap the result again")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("a TorchScript module cannot be edited: give the module that it was made of")
    tensors = named_tensors(model)
    for path, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError(f"tensor {path} has no values (meta device): load the model as a whole")
        if tensor.is_inference():
            raise InputError(
                f"tensor {path} was made in inference mode and cannot be edited: copy the model outside it"
            )
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
            raise InputError(f"tensor {path} is a {type(tensor).__name__}: convert the plain model, before that")
        if isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex()):
            raise InputError(f"parameter {path} holds {tensor.dtype}, as quantised models do: convert the original")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        raise InputError(f"{name} is on several devices ({', '.join(devices)}): put it on one, or convert its files")
    _refuse_shared_memory(tensors)


def _refuse_shared_memory(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are several and lie in one memory: an edit of one would reach the other, or part them."""
    spans = {}
    for path, tensor in tensors.items():
        if tensor.numel() and tensor.layout is torch.strided:
            reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            spans[id(tensor)] = (tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), path)
    for (_, end, one), (start, _, other) in pairwise(sorted(spans.values())):
        if start < end:
            raise InputError(
                f"tensors {one} and {other} share memory and are two: tie them as one parameter (a.weight = b.weight), "
                "or copy one"
            )
