"""Model on the meta device -> plan: trace it with probes, find its streams, ask the rewrite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from .errors import TraceError
from .options import Options
from .plan import Plan, Verdict
from .probes import further_inputs, likely_inputs, quiet, trace_inputs_candidates
from .rewrites.crmsnorm import plan_crmsnorm
from .rewrites.fuse_bn import plan_fuse_bn
from .rewrites.proof import difference
from .rewrites.rmsnorm import plan_rmsnorm
from .runtime import apply_module_edits
from .tracing import Graph, merge, trace

FURTHER_CALLS = 3


def trace_model(model: nn.Module) -> Graph:
    """Trace ``model`` with the first probe inputs that it accepts.

    Args:
        model: on the meta device.

    Raises:
        TraceError: no probe inputs fit, or torch.export cannot follow the model; the message is that of the first try.
    """
    with quiet():
        return _trace(model)


def _trace(model: nn.Module) -> Graph:
    first: TraceError | None = None
    for dtype in (torch.float64, None):  # in float64 no cast to float32 can hide; not all models run there
        candidate = model if dtype is None else copy.deepcopy(model).to(dtype)
        likely = _trace_likely(candidate)
        if likely is not None:
            return _with_further_calls(candidate, *likely)
        for inputs in trace_inputs_candidates(candidate):
            try:
                graph = trace(candidate, inputs)
            except TraceError as error:
                first = first or error
            else:
                return _with_further_calls(candidate, graph, inputs)
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


def _with_further_calls(model: nn.Module, graph: Graph, inputs: dict[str, Any]) -> Graph:
    """Add calls of the model that use parameters which the first leaves alone: another modality, masked patches."""
    if not graph.unreached:
        return graph
    calls = chain(
        ((more, None) for more in islice(further_inputs(model, inputs), FURTHER_CALLS)), _calls_of_the_base(model)
    )
    for more, entry in islice(calls, 2 * FURTHER_CALLS):
        try:
            other = trace(model, more, entry)
        except TraceError:
            continue
        if set(graph.unreached) - set(other.unreached):
            graph = merge(graph, other)
        if not graph.unreached:
            break
    return graph


def _calls_of_the_base(model: nn.Module) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Calls of a transformers model without its head, whose forward may take what that of the whole does not."""
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        for inputs in islice(trace_inputs_candidates(base), 1):
            for more in further_inputs(base, inputs):
                yield more, base


REWRITES: dict[str, Callable[[Graph, Options], Plan]] = {
    "rmsnorm": plan_rmsnorm,
    "crmsnorm": plan_crmsnorm,
    "fuse-bn": plan_fuse_bn,
}
"""Conversion -> what makes its plan from the traced model."""

PROOFS: dict[str, Callable[[Graph, Graph, Plan], str]] = {"fuse-bn": difference}
"""Conversion -> what compares the edited model's graph with the original's: it names a difference that is not meant."""


def plan_model(
    model: nn.Module,
    options: Options | None = None,
    method: str = "rmsnorm",
    tracer: Callable[[nn.Module], Graph] = trace_model,
) -> Plan:
    """The plan that converts the norms of ``model`` (on the meta device).

    Args:
        model: its weights are not read.
        options: what the user allows.
        method: one of :data:`REWRITES`.
        tracer: how a model becomes a graph; by default with probe inputs that it accepts.

    Raises:
        TraceError: see :func:`trace_model`.
    """
    graph = tracer(model)
    plan = REWRITES[method](graph, options or Options())
    if method in PROOFS and plan.converted:
        edited = copy.deepcopy(model)
        apply_module_edits(edited, plan.modules)
        try:
            found = PROOFS[method](graph, tracer(edited), plan)
        except TraceError as error:
            found = str(error)
        if found:
            verdicts = [_unproved(v, found) if v.converted else v for v in plan.verdicts]
            return Plan(method, verdicts=verdicts)
    return plan


def _unproved(verdict: Verdict, why: str) -> Verdict:
    reason = f"it could go {verdict.reason.rstrip('.')}, but the edited model is not the old one: {why}."
    return Verdict(verdict.path, verdict.kind, False, reason, "unproved")
