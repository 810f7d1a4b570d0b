"""A plan applied to tensors in memory: a state dict, or the tensors of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normconvert.apply.source_reader import is_finite, overflows
from normconvert.apply.underflow import Underflow
from normconvert.errors import InputError, first_line
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits, limited, refuse_oversized
from normconvert.plan.given_rotations import read_rotation


def edited_values(
    plan: Plan, tensors: Mapping[str, Tensor], limit: Callable[[str], float] | None = None
) -> dict[str, Tensor]:
    """Name -> what the plan makes of it, in float64; all are computed before any is used.

    Args:
        plan: of the model.
        tensors: name -> original value, of all tensors of the model.
        limit: name -> the largest number of the dtype that the tensor is stored in; None: of its own.

    Raises:
        InputError: the plan does not fit the tensors.
    """

    def lookup(name: str) -> Tensor:
        if name not in tensors:
            raise InputError(f"the plan reads the tensor {name!r}, which is not there: is it another model's?")
        return tensors[name].detach().cpu()  # the bits are those of the CPU wherever the tensors are

    def start(name: str, rows: list[dict[str, Any]]) -> Tensor:
        return lookup(beside(rows) or name)

    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    found = {}
    for name, rows in plan.tensors.items():
        refuse_oversized(name, rows, largest)
        tensor = start(name, rows)
        if not tensor.is_floating_point():
            raise InputError(f"the plan edits the tensor {name!r}, which is {_named(tensor.dtype)}, not floating")
        try:
            rows_now = limited(rows, limit or (lambda name: torch.finfo(lookup(name).dtype).max))
            found[name] = apply_edits(tensor, rows_now, lookup)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise InputError(f"the plan does not fit the tensor {name!r}: {first_line(error)}") from error
    return found


def beside(rows: list[dict[str, Any]]) -> str | None:
    """The tensor that a new one is stored beside, in its dtype and on its device; None for one that is there."""
    for row in rows:
        if row["op"] in ("new", "copy"):
            return str(row["like" if row["op"] == "new" else "from"])
    return None


def edited_tensors(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> what the plan makes of it, as it is stored: in the dtype and on the device of the original.

    Raises:
        InputError: the plan does not fit the tensors, or a value is not finite there, or too small for it.
    """
    values = edited_values(plan, tensors)
    return {name: _stored(name, value, plan.tensors[name], tensors) for name, value in values.items()}


def _stored(name: str, value: Tensor, rows: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> Tensor:
    like = tensors[beside(rows) or name].detach()
    # In memory it lies as the original does (channels last, say).
    made = torch.empty_like(like).copy_(value) if value.shape == like.shape else value.to(like.device, like.dtype)
    if not is_finite(made) and not any(row["op"] == "bound" for row in rows):
        raise overflows(name, like if is_finite(like) else None, like.dtype)
    lost = Underflow(name, rows)
    lost.see(value, made.cpu())
    lost.check(made.dtype)
    return made


def apply_plan(
    state_dict: Mapping[str, Tensor], plan: Plan | str | Path, *, rotation: str | Path | None = None
) -> dict[str, Tensor]:
    """A state dict with a plan's edits: for code that has checkpoints of its own, of the model that the plan is of.

    The arithmetic is in float64, and each tensor is stored in its dtype, as the conversion of files and models does it.
    For ``rmsnorm`` the model's own class computes the same as before; other conversions also change modules:
    ``normconvert.runtime.apply_module_edits(model, plan.modules)`` first, then ``load_state_dict``. A model that ties
    what the plan has parted needs a tensor for each before, and a config with what ``plan.config`` holds.

    Args:
        state_dict: name -> tensor; it and its tensors stay as they are.
        plan: ``report.plan`` of :func:`normconvert.convert_model` or of ``inspect`` with a model, or the JSON file that
            ``plan.save`` wrote.
        rotation: the file that the rotation was read from, if it was one and not by this process.

    Returns:
        A new state dict; tensors that the plan leaves alone are those of ``state_dict``.

    Raises:
        InputError: the plan is of another model: names, shapes or dtypes differ; or an edited tensor is not finite.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if rotation is not None:
        read_rotation(rotation)
    tensors = _of_the_plans_model(state_dict, plan)
    edited = edited_tensors(plan, tensors)
    for name, value in list(edited.items()):
        edited.update(dict.fromkeys(plan.aliases.get(name, ()), value))
    removed = set(plan.removed)
    kept = {name: edited.pop(name, tensor) for name, tensor in state_dict.items() if name not in removed}
    return {**kept, **{name: value for name, value in edited.items() if name in plan.tensors and name not in tensors}}


def _of_the_plans_model(state_dict: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors by all names that the plan may use, tied ones under each.

    Raises:
        InputError: they are another model's.
    """
    if not plan.shapes:
        raise InputError(
            "the plan does not say which tensors its model has: take that of convert_model or of inspect with a model"
        )
    for name, tensor in state_dict.items():
        if name not in plan.shapes:
            raise InputError(f"the state dict has the tensor {name!r}, which the plan's model does not have")
        if list(tensor.shape) != list(plan.shapes[name]):
            raise InputError(f"tensor {name!r} is {list(tensor.shape)}, and {plan.shapes[name]} in the plan's model")
    tensors = dict(state_dict)
    for name, aliases in plan.aliases.items():
        held = [one for one in (name, *aliases) if one in state_dict]
        values = [state_dict[one] for one in held]
        if any(a.dtype != values[0].dtype or not torch.equal(a, values[0]) for a in values[1:]):
            raise InputError(f"tensors {', '.join(held)} are one in the plan's model, and differ here")
        tensors.update(dict.fromkeys((name, *aliases), values[0]) if held else {})
    for name, rows in plan.tensors.items():
        origin = rows[0].get("from") if rows else None
        if name in tensors and origin in tensors and not torch.equal(tensors[name], tensors[str(origin)]):
            raise InputError(f"tensors {origin} and {name} are one in the plan's model, and differ here")
    if missing := [name for name in plan.shapes if name not in tensors]:
        raise InputError(f"the state dict lacks the tensor {missing[0]!r} of the plan's model, one of {len(missing)}")
    return tensors


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
