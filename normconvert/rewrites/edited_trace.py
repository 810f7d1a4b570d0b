"""The edited skeleton, traced as the original was: the second graph of the comparison.

What the runtime puts in cannot be held against operations of the original, so one operation stands for each of its
parts: it carries what the part is applied to, and its settings as they were built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from normconvert.errors import TraceError
from normconvert.rewrites.ties import set_as_taken
from normconvert.runtime import Center, Compress, apply_module_edits
from normconvert.runtime.norms import NORMS
from normconvert.tracing.graph import Graph, merge, trace
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.probes import quiet


class Differs(Exception):
    """The edited model is not the old one; ``path`` is the module where that shows."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@torch.library.custom_op("normconvert::inserted", mutates_args=())
def _inserted(x: Tensor, what: str, axis: int) -> Tensor:
    """Stands for an operation at a module's boundary; compressing leaves one channel less."""
    return (x.narrow(axis, 0, x.shape[axis] - 1) if what != "center" else x).clone()  # no view of its input


@_inserted.register_fake
def _(x: Tensor, what: str, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] -= what != "center"
    return torch.empty_like(x) if what == "center" else x.new_empty(shape)


@torch.library.custom_op("normconvert::norm", mutates_args=())
def _norm(result: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: str) -> Tensor:
    """Stands for a norm of the runtime: ``result`` is what it made of the other operands."""
    return result.clone()


@_norm.register_fake
def _(result: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: str) -> Tensor:
    return torch.empty_like(result)


INSERTED = torch.ops.normconvert.inserted.default
NORM = torch.ops.normconvert.norm.default


def trace_edited(
    graph: Graph,
    modules: Sequence[Mapping[str, Any]],
    untied: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
) -> Graph:
    """The graph of the model with module edits applied, called as ``graph`` was.

    Where nothing but values of tensors is edited, which no trace sees, the model is the same, and so is its graph.

    Args:
        graph: of the original.
        modules: rows for :func:`normconvert.runtime.apply_module_edits`.
        untied: names that are tensors of their own now, and their shapes.
        config: numbers and switches that the model's config.json holds now, by dotted keys: what the model reads of
            it while it runs.

    Raises:
        Differs: the edits do not fit the model, or it cannot be traced with them.
    """
    if not (modules or untied or config):
        return graph
    model: Any = copy_model(graph.modules[""])
    set_as_taken(model, config or {})  # into the copy's own, which its modules share
    # A model may hold parts of the runtime before it is edited, which are the same on both sides.
    # Held by reference: what is edited away must not leave its id to what takes its place.
    own = {id(part): part for module in model.modules() for part in (module, *_operations_at(module))}
    try:
        apply_module_edits(model, modules)
    except ValueError as error:
        raise Differs("", str(error)) from error
    for name, shape in untied.items():
        _untie(model, name, shape)
    for module in list(model.modules()):
        if type(module) in NORMS.values() and id(module) not in own:
            module.forward = _standing_for(module)
        for hook in _operations_at(module):
            if id(hook) not in own:
                vars(hook)["change"] = _change(hook)
    return trace_as(graph, model)


def trace_as(graph: Graph, model: nn.Module) -> Graph:
    """The graph of another model, called as that of ``graph`` was.

    Raises:
        Differs: it cannot be traced so.
    """
    traced: Graph | None = None
    with _running(model) as stack, quiet():
        for inputs, path in graph.calls:
            try:
                found = trace(model, inputs, path)
            except TraceError as error:
                reason = str(error).removeprefix("the model could not be traced: ")
                raise Differs(stack[-1] if stack else "", reason) from error
            traced = found if traced is None else merge(traced, found)
    assert traced is not None
    return traced


def _operations_at(module: nn.Module) -> list[Center]:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Center)]


def _change(hook: Center) -> Callable[[Tensor], Tensor]:
    what = f"compress {hook.basis}" if isinstance(hook, Compress) else "center"

    def change(x: Tensor) -> Tensor:
        result: Tensor = _inserted(x, what, hook.axis)
        return result

    return change


def _standing_for(norm: Any) -> Callable[[Tensor], Tensor]:
    """The forward of a norm whose result says what it is made of."""
    run = norm.forward
    settings = {
        "kind": next(kind for kind, made in NORMS.items() if type(norm) is made),
        "size": norm.normalized_shape[0],
        **{key: getattr(norm, key) for key in ("eps", "axis", "offset", "channels_last")},
        **{key: getattr(norm, key) for key in ("basis", "expand") if hasattr(norm, key)},
    }
    text = json.dumps(settings)

    def forward(input: Tensor) -> Tensor:
        weight, bias = getattr(norm, norm.weight_name), getattr(norm, norm.bias_name)
        # A view, since operations that return their operand would make the norm seem to read what they return.
        result: Tensor = _norm(run(input.view_as(input)), input, weight, bias, text)
        return result

    return forward


def settings_of(node: fx.Node) -> dict[str, Any]:
    """The settings of the norm that a node stands for."""
    found: dict[str, Any] = json.loads(str(node.args[4]))
    return found


def _untie(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner.register_parameter(leaf, nn.Parameter(owner.get_parameter(leaf).new_empty(shape)))


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """While open, the paths of the modules that run, innermost last; they stay where an error stops the model."""
    stack: list[str] = []
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            stack.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()

        # First, so that an error in another hook is this module's.
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))

    for path, module in model.named_modules():
        watch(path, module)
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
