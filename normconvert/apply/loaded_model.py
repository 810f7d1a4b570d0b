"""The way out for checkpoints whose tensors the library merges or splits: through the loaded model.

It needs memory for the whole model, and is taken only where names do not map one to one.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normconvert.apply.source_reader import check_finite, is_finite, overflows
from normconvert.apply.state import edited_values
from normconvert.apply.underflow import Underflow
from normconvert.files.safetensors_file import FLOATING, torch_dtype
from normconvert.plan.conversion_plan import Plan, set_in_config

if TYPE_CHECKING:
    from normconvert.sources import Source


def save_loaded(
    source: Source, plan: Plan, folder: Path, dtype: torch.dtype | None, max_shard_size: int | None
) -> tuple[tuple[str, ...], int]:
    """Load the model, apply the plan to its tensors, save it in the library's format.

    Returns:
        Model names of the edited tensors, and how many were not edited.

    Raises:
        InputError: the plan names a tensor the model does not have, or a weight is not finite, or not in ``dtype``.
    """
    # In a dtype that holds every tensor of the files: they are rounded once, at the end.
    stored = (torch_dtype(info.dtype) for info in source.tensors.values() if info.dtype in FLOATING)
    wide = reduce(torch.promote_types, stored)
    dtype = source.dtype if dtype is None and wide != source.dtype else dtype
    model = source.load(dtype=wide)
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, _ in model.named_parameters():
        check_finite(name, state[name])

    def limit(name: str) -> float:
        return torch.finfo(dtype or state[name].dtype).max

    # All are computed before one is assigned: edits read the source's values, and `state` is the model's memory.
    edited = edited_values(plan, state, limit)
    # Only now: the values above were computed from the shapes that the source has.
    _shape(model, plan)
    if dtype is not None:
        model = model.to(dtype)
    for name, value in edited.items():
        lost = Underflow(name, plan.tensors[name])
        lost.see(value, value.to(dtype or state[name].dtype))
        lost.check(dtype or state[name].dtype)
        _assign(model, name, value, untied=any(row["op"] == "copy" for row in plan.tensors[name]))
    infinite = {name for name, rows in plan.tensors.items() if any(row["op"] == "bound" for row in rows)}
    for name, parameter in model.named_parameters():
        if name not in infinite and not is_finite(parameter.detach()):
            # `state` holds the source's values still where the model was cast.
            original = state.get(name)
            raise overflows(name, original if original is None or is_finite(original) else None, parameter.dtype)
    save_model(source, plan, model, folder, max_shard_size)
    return tuple(edited), len(state) - len(edited)


def _shape(model: nn.Module, plan: Plan) -> None:
    """Give the model the tensors that the plan's module edits add or resize, and take away those that they remove."""
    from normconvert.runtime import STRUCTURAL, apply_module_edits

    apply_module_edits(model, [e for e in plan.modules if e["op"] in STRUCTURAL or e.get("dropped")])


def _assign(model: nn.Module, name: str, value: Tensor, untied: bool) -> None:
    """Put a value into a parameter, in place so that tied names follow; an untied copy becomes its own parameter."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old: Tensor = getattr(module, leaf)
    value = value.to(old.dtype)
    # In place it would write through to the table that it is a copy of.
    if untied:
        setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    elif value.shape == old.shape:
        old.data.copy_(value)
    else:
        old.data = value


def save_model(source: Source, plan: Plan, model: Any, folder: Path, max_shard_size: int | None) -> None:
    """Save a loaded model with its config in the library's format; the plan says what changes in the config."""
    if source.library == "timm":
        from safetensors.torch import save_file

        # save_file refuses tensors that share memory, as tied ones do.
        state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    from normconvert.sources.transformers_models import quiet

    # Into the config that save_pretrained writes; config.json itself is put right afterwards, with the source's keys.
    for key, value in plan.config.items():
        set_in_config(model.config, key, value)
    generation = folder / "generation_config.json"
    # save_pretrained writes this file anew, with defaults; the source's own has been copied here before.
    kept = generation.read_bytes() if generation.is_file() else None
    with quiet():
        state = dict(model.state_dict())
        if plan.guard is not None:
            state[plan.guard] = torch.empty(0, dtype=model.dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size or "5GB", state_dict=state)
    if kept is not None:
        generation.write_bytes(kept)
