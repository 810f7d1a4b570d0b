"""The tensors of a LoRA or DoRA, converted: a plan's edits on factors, on whole tensors, and on biases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.adapters.adapter_files import PREFIX, Adapter, LowRank
from normconvert.adapters.dependence import Original, check_dependents, edits_of, module_of
from normconvert.adapters.low_rank import LINEAR, edited, edited_bias, layout_of
from normconvert.adapters.merging import submodule
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits

BIAS_NOTE = "lora_bias is on in the converted adapter: the conversion moves a norm's bias through weights it changes"


def convert_changes(adapter: Adapter, plan: Plan, truth: nn.Module, converted: nn.Module) -> tuple[Adapter, list[str]]:
    """The adapter of the converted model.

    Args:
        adapter: of the original.
        plan: of the conversion.
        truth: the original in float64.
        converted: the plan applied to it; only which modules and biases it has is read.

    Returns:
        The adapter with all its tensors in float64, and sentences for the user.

    Raises:
        InputError: it is another model's adapter, or what it computes has no such form for the converted model.
    """
    original = _without_copies(Original.of(truth, adapter))
    settled: set[str] = set()
    low_rank = {path: _change(original, plan, change, settled) for path, change in adapter.low_rank.items()}
    saved, keys = _saved(original, plan, adapter)
    settled |= set(saved)
    check_dependents(original, plan, settled)
    for path in (*low_rank, *map(module_of, saved)):
        submodule(converted, path)
    result = replace(adapter, low_rank=low_rank, saved=saved, saved_keys=keys)
    gained = [p for p, change in low_rank.items() if change.bias is not None and adapter.low_rank[p].bias is None]
    return (_with_biases(result, converted, gained), [BIAS_NOTE]) if gained else (result, [])


def _without_copies(original: Original) -> Original:
    """The same without whole tensors that are the model's own: PEFT saves a table beside what LoRA adds to it.

    Raises:
        InputError: a tensor that the model does not have, of another shape, or one that nobody asked to train.
    """
    adapter, trained = original.adapter, {}
    for name, value in adapter.saved.items():
        own = original.source(name)
        if own.shape != value.shape:
            raise InputError(
                f"{adapter.saved_keys[name]} is {tuple(value.shape)} in the adapter and {tuple(own.shape)} in the "
                "model: is the adapter one of another model, or of a resized vocabulary?"
            )
        if torch.equal(own.to(value.dtype), value):
            continue
        if not _is_trained(name, adapter.config):
            raise InputError(
                f"{adapter.saved_keys[name]} differs from the original's tensor and is in no module of modules_to_save:"
                " is the adapter one of another checkpoint?"
            )
        if _is_bias(name, adapter.config) and len(original.groups[name]) > 1:
            raise InputError(f"{name} is a trained bias that modules share: merge the adapter into the original")
        trained[name] = value
    return replace(original, adapter=replace(adapter, saved=trained))


def _is_bias(name: str, config: dict[str, Any]) -> bool:
    return config.get("bias", "none") != "none" and name.endswith("bias")


def _is_trained(name: str, config: dict[str, Any]) -> bool:
    """Whether PEFT was asked to keep the tensor: it lies in a module of ``modules_to_save``, or is a trained bias."""
    within = (f".{module_of(name)}.".find(f".{module}.") >= 0 for module in config.get("modules_to_save") or ())
    return any(within) or _is_bias(name, config)


def _change(original: Original, plan: Plan, change: LowRank, settled: set[str]) -> LowRank:
    """One module's factors; ``settled`` gains the names of the tensors that they speak for."""
    path = change.path
    module = submodule(original.model, path)
    name, bias_name = f"{path}.weight", f"{path}.bias"
    weight = original.source(name)
    layout = layout_of(module, change, weight)
    rows, bias_rows = edits_of(plan, name), edits_of(plan, bias_name)
    changed = {n for row in rows for n in original.changed_reads(row, name)}
    if changed:
        raise InputError(
            f"the conversion multiplies {name} by {min(changed)}, and the adapter changes both: the product is no "
            "LoRA; merge the adapter into the original and convert that"
        )
    result = edited(change, layout, rows, weight, original.source)
    centred = _centred_by_hook(plan, path, weight.ndim, change)
    if centred:
        # PEFT adds B A x to what the module returns, behind the operation that stands there.
        result = replace(result, b=apply_edits(result.b, [{"op": "center", "axis": 0}], original.source, own=True))
    settled.add(name)
    products = [row for row in bias_rows if row["op"] == "add_product" and original.changed_reads(row, bias_name)]
    whole = bias_name in original.adapter.saved
    if whole:  # it is made anew, of the changed weight
        bias_rows, products = [row for row in bias_rows if row["op"] != "add_product"], []
    if change.bias is None and not products:
        return result
    if any(original.changed_reads(row, bias_name) - {name} for row in bias_rows):
        raise InputError(f"the conversion makes {bias_name} of tensors that the adapter changes: merge the adapter")
    if change.magnitude is not None:
        raise InputError(
            f"{path}: the conversion moves a norm's bias through this weight, and DoRA has no bias to take it: "
            "merge the adapter into the original and convert that"
        )
    bias = change.bias if change.bias is not None else weight.new_zeros(weight.shape[layout.outputs])
    if bias_name not in original.tensors and not bias_rows:  # only the adapter has one: it goes where the weight does
        bias_rows = [{**row, "axis": 0} for row in rows if row["op"] in LINEAR and _along(row, layout.outputs, weight)]
    bias = edited_bias(bias, bias_rows, original.product(bias_name), original.source)
    if centred:
        bias = bias - bias.mean()
    settled.add(bias_name)
    key = change.keys["b"].removesuffix("weight") + "bias"
    return replace(result, bias=bias, keys={**change.keys, "bias": change.keys.get("bias", key)})


def _along(row: dict[str, Any], dimension: int, weight: Tensor) -> bool:
    return row["op"] == "times" or int(row["axis"]) % weight.ndim == dimension


def _centred_by_hook(plan: Plan, path: str, ndim: int, change: LowRank) -> bool:
    """Whether the converted model centres what this module returns.

    Raises:
        InputError: it does something else to the module's input or output.
    """
    hooks = [row for row in plan.modules if row["path"] == path and "side" in row]
    for row in hooks:
        expected = 1 - ndim if ndim > 2 else -1  # channels of a convolution's result come after the batch
        fits = row["op"] == "center" and row["side"] == "output" and not row.get("key")
        if not fits or int(row.get("axis", -1)) != expected or change.magnitude is not None:
            raise InputError(
                f"{path}: the converted model does {row['op']} at the {row['side']} of this module, which its adapter "
                "cannot follow: merge the adapter into the original and convert that"
            )
    return bool(hooks)


def _saved(original: Original, plan: Plan, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Whole tensors: the plan's edits of them, with what the adapter changes looked up as changed."""
    saved: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for name, value in adapter.saved.items():
        if name not in plan.removed:
            saved[name] = apply_edits(value, edits_of(plan, name), original.with_adapter(name))
            keys[name] = adapter.saved_keys[name]
    # A bias that a module gains by the conversion is saved with the module, or with all biases.
    for name in _gained(plan):
        beside = f"{module_of(name)}.weight"
        if beside in original.adapter.saved:
            keys[name] = adapter.saved_keys[beside].removesuffix("weight") + name.rpartition(".")[2]
        elif adapter.config.get("bias") == "all" and name.endswith("bias"):
            keys[name] = PREFIX + name
        else:
            continue
        saved[name] = apply_edits(torch.empty(0), edits_of(plan, name), original.with_adapter(name))
    return saved, keys


def _gained(plan: Plan) -> Iterable[str]:
    return (name for name, rows in plan.tensors.items() if rows and rows[0]["op"] == "new")


def _with_biases(adapter: Adapter, converted: nn.Module, gained: list[str]) -> Adapter:
    """The adapter with ``lora_bias``, which is on for all its modules or for none.

    Raises:
        InputError: one of them cannot have it.
    """
    if adapter.config.get("init_lora_weights", True) not in (True, False):
        raise InputError(f"{gained[0]} needs lora_bias, which PEFT has for init_lora_weights true or false only")
    low_rank = {}
    for path, change in adapter.low_rank.items():
        held: Any = getattr(submodule(converted, path), "bias", None)
        if change.embedding or held is None:
            raise InputError(
                f"{gained[0]} needs lora_bias, since the conversion moves a norm's bias through its weight, and {path} "
                "has no bias to go with that: merge the adapter into the original and convert that"
            )
        bias = change.bias if change.bias is not None else held.new_zeros(held.shape)
        key = change.keys.get("bias", change.keys["b"].removesuffix("weight") + "bias")
        low_rank[path] = replace(change, bias=bias, keys={**change.keys, "bias": key})
    return replace(adapter, low_rank=low_rank, config={**adapter.config, "lora_bias": True})
