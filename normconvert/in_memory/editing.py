"""A plan's edits in a model in memory: computed before anything is touched, and put in as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from normconvert.apply.state import beside
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.ties import set_as_taken
from normconvert.runtime import apply_module_edits
from normconvert.verification.algebra import named_tensors


def put_in(model: nn.Module, plan: Plan, values: dict[str, Tensor]) -> None:
    """Apply the plan's module edits to ``model`` itself and give it the edited tensors.

    Parameters stay the objects that they are, with what they require of gradients; new ones take that after the tensor
    that they stand beside. If anything is in the way, the model is as it was.

    Raises:
        InputError: the plan does not fit the model.
    """
    with _all_or_nothing(model):
        before = named_tensors(model)
        try:
            apply_module_edits(model, plan.modules)
        except ValueError as error:
            raise InputError(f"the plan does not fit the model: {error}") from error
        for name, value in values.items():
            _assign(model, name, value, plan, before)
        set_as_taken(model, plan.config)


def _assign(model: nn.Module, name: str, value: Tensor, plan: Plan, before: dict[str, Tensor]) -> None:
    path, _, leaf = name.rpartition(".")
    owner, rows = model.get_submodule(path), plan.tensors[name]
    like = before[beside(rows) or name]
    value = value.to(like.device)
    old = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if old is None or rows[0]["op"] == "copy":  # in place it would write through to the table that it is a copy of
        owner.register_parameter(leaf, nn.Parameter(value.clone(), like.requires_grad))
    elif any(edit["op"] == "resize" and edit["path"] == path and edit["name"] == leaf for edit in plan.modules):
        old.data.copy_(value)  # fresh memory, with room that the runtime gave it
    else:
        old.data = value
        old.requires_grad_(like.requires_grad)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Whatever ends what happens within, but its end: modules, hooks, attributes, tensors and settings as before."""
    modules = list(model.modules())
    kept = [(vars(module), dict(vars(module)), type(module), module) for module in modules]
    tables = [value for _, held, _, _ in kept for value in held.values() if isinstance(value, dict)]
    inside = [(table, dict(table)) for table in tables]
    data = [(tensor, tensor.data, tensor.requires_grad) for tensor in named_tensors(model).values()]
    config = getattr(model, "config", None)
    settings = [(node, dict(vars(node))) for node in (config, *_parts(config)) if hasattr(node, "__dict__")]
    try:
        yield
    except BaseException:
        for table, held in inside:
            table.clear()
            table.update(held)
        for attributes, held, kind, module in kept:
            module.__class__ = kind
            attributes.clear()
            attributes.update(held)
        for tensor, value, wanted in data:
            tensor.data = value
            tensor.requires_grad_(wanted)
        for node, held in settings:
            vars(node).clear()
            vars(node).update(held)
        raise


def _parts(config: Any) -> list[Any]:
    """The settings within settings, one level down."""
    return [value for value in getattr(config, "__dict__", {}).values() if hasattr(value, "to_dict")]
