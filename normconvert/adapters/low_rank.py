"""A plan's edits of a weight, carried over to the factors of what LoRA adds to it.

An edit E of a weight is linear but for constants, so E(W + s B A) = E(W) + s E'(B A) with its linear part E'. An edit
along the outputs acts on B alone and one along the inputs on A alone, in the order of the plan:

    center    P W          ->  P B             scale by rows      diag(g) W  ->  diag(g) B
    compress  B' W         ->  B' B            scale by columns   W diag(g)  ->  A diag(g)
    rotate    Q W          ->  Q B             rotate             W Q'       ->  A Q'
    times     2^k W        ->  2^k B           read_compressed    W L        ->  A L

DoRA is W' = m V / |V| with V = W + s B A and the lengths |V| of its rows. An edit that keeps rows apart turns V into
V', and m' = m |V'| / |V| makes m' V' / |V'| = m V' / |V|, which is the edit of W'. Centring along the outputs mixes
rows: P diag(m / |V|) V is no matrix whose rows are a number times those of P V, so it has no such form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.adapters.adapter_files import LowRank
from normconvert.errors import InputError
from normconvert.plan.edits import Edit, Lookup, apply_edits

LINEAR = frozenset({"center", "scale", "compress", "read_compressed", "rotate", "times"})
"""Edits whose linear part is the edit itself, of weights that are stored as they are applied."""
CONSTANT = frozenset({"shift", "new"})
"""Edits that add or are something that no weight changes."""
MIXING = frozenset({"center", "compress", "rotate"})


@dataclass(frozen=True)
class Layout:
    """How the weight of a module holds its map: ``outputs`` and ``inputs`` are its dimensions."""

    outputs: int
    inputs: int


def layout_of(module: nn.Module, change: LowRank, weight: Tensor) -> Layout:
    """Where outputs and inputs are in the weight of ``module``, checked against the factors.

    Raises:
        InputError: a module that LoRA is not known of, or factors of other sizes.
    """
    kind = type(module)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if (conv1d and not change.embedding) or (isinstance(module, nn.Embedding) and change.embedding):
        layout = Layout(1, 0)
    elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not change.embedding:
        layout = Layout(0, 1)
        if getattr(module, "groups", 1) != 1:
            raise InputError(f"{change.path}: LoRA on a convolution in groups is not supported: merge the adapter")
    else:
        raise InputError(f"{change.path}: LoRA on a {kind.__name__} is not supported: merge the adapter")
    plain = weight.ndim == 2
    expected = {
        "a": (change.a.shape[0], weight.shape[layout.inputs], *weight.shape[2:]),
        "b": (weight.shape[layout.outputs], change.a.shape[0], *[1] * (weight.ndim - 2)),
        "bias": (weight.shape[layout.outputs],),
        "magnitude": (weight.shape[layout.outputs],),
    }
    for name, shape in expected.items():
        value = getattr(change, name)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(
                f"{change.path}: {change.keys[name]} is {tuple(value.shape)}, expected {shape}: "
                "is the adapter one of another model?"
            )
    if change.magnitude is not None and (change.embedding or not plain):
        raise InputError(f"{change.path}: DoRA on a {kind.__name__} is not supported: merge the adapter")
    return layout


def delta(change: LowRank, layout: Layout, shape: Sequence[int]) -> Tensor:
    """B A in float64, unscaled, in the layout and the shape of the weight."""
    product = change.b.double().flatten(1) @ change.a.double().flatten(1)
    return product.t() if layout.outputs == 1 else product.reshape(tuple(shape))


def adapted(change: LowRank, layout: Layout, weight: Tensor) -> Tensor:
    """The weight with the change, in float64; that of DoRA has rows of length ``magnitude``."""
    value = weight.double() + change.scaling * delta(change, layout, weight.shape)
    if change.magnitude is None:
        return value
    rows = value.norm(dim=layout.inputs, keepdim=True)
    return value / rows * change.magnitude.double().reshape(rows.shape)


def edited(change: LowRank, layout: Layout, edits: Sequence[Edit], weight: Tensor, lookup: Lookup) -> LowRank:
    """The change of the converted weight, in float64.

    Args:
        change: of the source's weight.
        layout: of that weight.
        edits: of that weight, in the plan.
        weight: the source's; only DoRA needs it.
        lookup: the source's tensors.

    Raises:
        InputError: the change cannot be expressed as one of its kind; the message says why.
    """
    # A copy under a second name is the same tensor before; LoRA changes one module, whatever its weight is tied to.
    rows = [row for row in edits if row["op"] != "copy"]
    a, b = change.a.double(), change.b.double()
    for row in rows:
        side = _side(change, layout, row, weight.ndim)
        if side == "b":
            if change.magnitude is not None and row["op"] in MIXING:
                raise InputError(
                    f"{change.path}: DoRA scales the rows of a weight that the conversion changes along its outputs "
                    f"({row['op']}), and the result is no DoRA of the new weight: merge the adapter into the original "
                    "and convert that"
                )
            b = apply_edits(b, [{**row, "axis": 0}], lookup)
        else:
            a = apply_edits(a, [{**row, "axis": 1}], lookup)
    result = replace(change, a=a, b=b)
    if change.magnitude is not None and rows:
        before = weight.double() + change.scaling * delta(change, layout, weight.shape)
        after = apply_edits(before, rows, lookup)
        lengths = [value.norm(dim=layout.inputs) for value in (after, before)]
        result = replace(result, magnitude=change.magnitude.double() * lengths[0] / lengths[1])
    return result


def _side(change: LowRank, layout: Layout, row: Mapping[str, Any], ndim: int) -> str:
    """The factor that an edit acts on."""
    axis = int(row["axis"]) % ndim if "axis" in row else -1
    if row["op"] == "times" and "part" not in row:
        return "b"
    if row["op"] in LINEAR and int(row.get("groups", 1)) == 1 and "part" not in row:
        if axis == layout.outputs:
            return "b"
        if axis == layout.inputs:
            return "a"
    raise InputError(
        f"{change.path}: the conversion does {row['op']} to this weight, which LoRA cannot take: "
        "merge the adapter into the original and convert that"
    )


def edited_bias(bias: Tensor, edits: Sequence[Edit], product: Lookup, lookup: Lookup) -> Tensor:
    """What the bias of the converted module changes by, where the source's changes by ``bias`` and its weight by B A.

    Args:
        bias: (outputs,), unscaled.
        edits: of the module's bias in the plan.
        product: tensor name -> B A in the layout of that weight, unscaled; zeros where the adapter adds nothing.
        lookup: the source's tensors.

    Raises:
        InputError: an edit that is not linear.
    """
    value = bias.to(torch.float64, copy=True)
    for row in edits:
        if row["op"] == "add_product":
            changed = str(row["weight"])
            value = apply_edits(value, [row], lambda name, w=changed: product(name) if name == w else lookup(name))  # type: ignore[misc]
        elif row["op"] in LINEAR:
            value = apply_edits(value, [row], lookup)
        elif row["op"] not in CONSTANT:
            raise InputError(f"the conversion does {row['op']} to a bias, which LoRA cannot take: merge the adapter")
    return value
