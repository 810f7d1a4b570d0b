"""Model on the meta device -> Graph: with probe inputs that it accepts, and with further calls until all is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from functools import reduce
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from normconvert.errors import TraceError
from normconvert.runtime import one_at_a_time
from normconvert.tracing.calls import Call, given_calls, in_dtype
from normconvert.tracing.doors import not_given, with_doors
from normconvert.tracing.entries import entry_of_part, parts_that_take
from normconvert.tracing.graph import Graph, merge, trace
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.probes import (
    OPTIONAL,
    further_inputs,
    likely_inputs,
    optional_input,
    quiet,
    trace_inputs_candidates,
)
from normconvert.tracing.probes.choose import floating_dtype
from normconvert.wording.steps import Step

FURTHER_CALLS = 3


@one_at_a_time
def trace_model(model: nn.Module) -> Graph:
    """Trace ``model`` with the first probe inputs that it accepts.

    Args:
        model: on the meta device.

    Raises:
        TraceError: no probe inputs fit, or torch.export cannot follow the model; the message is that of the first try.
    """
    if calls := given_calls(model):
        return trace_calls(model, calls, doors=False)
    with quiet():
        return _trace(model)


@one_at_a_time
def trace_calls(model: nn.Module, calls: tuple[Call, ...], doors: bool) -> Graph:
    """Trace ``model`` as these calls run it, and as no others do.

    Args:
        model: on the meta device.
        calls: keyword arguments of ``forward``, on the CPU.
        doors: the model's library is known, and so are further ways into and out of it: these are traced as well. Else
            the arguments that no call gives are named as not proved, and so is what a call leaves in the modules.

    Raises:
        TraceError: torch.export cannot follow the model in one of them; the message is that of the first try.
    """
    first: TraceError | None = None
    for dtype in (torch.float64, None):
        # Not the model's own method, which libraries give warnings of their own.
        candidate = model if dtype is None else nn.Module.to(copy_model(model), dtype)
        given = [in_dtype(call, dtype or floating_dtype(model)) for call in calls]
        try:
            with quiet():
                graph = reduce(merge, [trace(candidate, call) for call in given])
                if doors:
                    return with_doors(candidate, graph, given[0])
        except TraceError as error:
            first = first or error
        else:
            left = [f"what a call leaves in `{name}`" for name in graph.kept]
            return replace(graph, untraced_doors=(*not_given(model, calls), *left))
    assert first is not None
    raise first


def tracing_told(say: Callable[[str], None]) -> Callable[[nn.Module], Graph]:
    """:func:`trace_model`, and ``say`` is told of it and of what comes after it, as steps."""

    def traced(model: nn.Module) -> Graph:
        say(Step("following the calls of the model", 0, 2))
        graph = trace_model(model)
        say(Step("planning", 1, 2))
        return graph

    return traced


def _trace(model: nn.Module) -> Graph:
    first: TraceError | None = None
    for dtype in (torch.float64, None):  # in float64 no cast to float32 can hide; not all models run there
        # A copy, since the caller's model keeps its dtype.
        candidate = model if dtype is None else copy_model(model).to(dtype)
        likely = _trace_likely(candidate)
        if likely is not None:
            return _with_all_calls(candidate, *likely)
        for inputs in trace_inputs_candidates(candidate):
            try:
                graph = trace(candidate, inputs)
            except TraceError as error:
                first = first or error
            else:
                return _with_all_calls(candidate, graph, inputs)
    raise first or TraceError(f"no probe inputs are known for {type(model).__name__}; it cannot be traced")


def _trace_likely(model: nn.Module) -> tuple[Graph, dict[str, Any]] | None:
    """The graph for the most likely inputs, which fit nearly all models, and the inputs; None if they do not.

    A trace runs the model as the search for inputs does, so there is nothing to try out before it. Where it goes on
    with a value that it does not know, other inputs may need none: the search looks for such.
    """
    inputs = likely_inputs(model)
    if inputs is None:
        return None
    try:
        graph = trace(model, inputs)
    except TraceError:
        return None
    return None if any(node.meta.get("unbacked_bindings") for node in graph.nodes) else (graph, inputs)


def _with_all_calls(model: nn.Module, graph: Graph, inputs: dict[str, Any]) -> Graph:
    return with_doors(model, _with_further_calls(model, graph, inputs), inputs)


def _with_further_calls(model: nn.Module, graph: Graph, inputs: dict[str, Any]) -> Graph:
    """Add calls of the model that use parameters which the first leaves alone: another modality, masked patches."""
    # A buffer that the constructor works out (a rotary table for longer texts) is no reason to look for a call.
    stored = model.state_dict().keys()

    def missing(graph: Graph) -> Set[str]:
        return graph.unreached.keys() & stored

    if not missing(graph):
        return graph
    calls = chain(
        ((more, "") for more in islice(further_inputs(model, inputs), FURTHER_CALLS)), _calls_of_the_base(model)
    )
    # Calls of parts come last: what the base returns is a way out, which only a call of it shows.
    parts = _calls_of_parts(model, inputs, lambda: missing(graph))
    for more, entry in chain(islice(calls, 2 * FURTHER_CALLS), islice(parts, FURTHER_CALLS)):
        try:
            other = trace(model, more, entry)
        except TraceError:
            continue
        # A call that reads nothing new could only add leaks.
        if missing(graph) - missing(other):
            graph = merge(graph, other)
        if not missing(graph):
            break
    return graph


def _calls_of_parts(
    model: nn.Module, inputs: dict[str, Any], missing: Callable[[], Set[str]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Calls that give a part, which holds missing tensors, an argument that ``forward`` has none for."""
    for argument in OPTIONAL:
        if argument not in inspect.signature(model.forward).parameters:
            for path in parts_that_take(model, argument, missing()):
                yield {**inputs, argument: optional_input(model, argument)}, entry_of_part(path, argument)


def _calls_of_the_base(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Calls of a transformers model without its head, whose forward may take what that of the whole does not."""
    base = getattr(model, "base_model", None)
    path = next((path for path, module in model.named_modules() if module is base), "")
    if path:
        for inputs in islice(trace_inputs_candidates(model.get_submodule(path)), 1):
            for more in further_inputs(model.get_submodule(path), inputs):
                yield more, path
