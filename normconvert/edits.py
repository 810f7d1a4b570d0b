"""The arithmetic a plan may ask for on one tensor: a table of operations, applied in float64.

A plan never holds code. It names tensors and lists, for each, operations from :data:`EDITS`; this module is the only
place that gives them a meaning, and it is used alike by the streaming writer and by the float64 verification.

A channel axis may be one factor of a tensor dimension (``outer * size * inner``), as when a fused projection holds
several blocks of channels; ``axis`` is the dimension, ``outer`` and ``inner`` the other factors (1 if plain).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Edit = Mapping[str, Any]
Lookup = Callable[[str], Tensor]
"""Returns a *source* tensor (not edited) in float64 by its name in the model."""


def _split(x: Tensor, edit: Edit) -> tuple[Tensor, int, tuple[int, ...]]:
    """View dimension ``axis`` as (outer, size, inner); returns the view, the channel dimension in it, the old shape."""
    axis = int(edit["axis"]) % x.ndim
    outer, inner = int(edit.get("outer", 1)), int(edit.get("inner", 1))
    shape = tuple(x.shape)
    size = shape[axis] // (outer * inner)
    if size * outer * inner != shape[axis]:
        raise ValueError(f"dimension {axis} of shape {shape} is not {outer} x size x {inner}")
    return x.reshape(*shape[:axis], outer, size, inner, *shape[axis + 1 :]), axis + 1, shape


def _center(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- P x along the channels, P = I - 11'/d (arXiv 2305.14858, eq. 7)."""
    view, dim, shape = _split(x, edit)
    return (view - view.mean(dim, keepdim=True)).reshape(shape)


def _vector(view: Tensor, dim: int, vector: Tensor) -> Tensor:
    """``vector`` shaped to broadcast along ``dim`` of ``view``."""
    shape = [1] * view.ndim
    shape[dim] = view.shape[dim]
    return vector.reshape(shape)


def _scale(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- (by + offset) * x along the channels: a layer scale or a norm's weight moving into a linear map."""
    view, dim, shape = _split(x, edit)
    vector = lookup(edit["by"]) + float(edit.get("offset", 0.0))
    return (view * _vector(view, dim, vector)).reshape(shape)


def _add_product(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """b <- b + W v: a norm's bias v moving through the linear map W (v along ``axis`` of W) into the bias b."""
    weight, vector = lookup(edit["weight"]), lookup(edit["by"])
    product: Tensor = torch.tensordot(weight, vector, dims=([int(edit["axis"])], [0]))
    return x + product.reshape(x.shape)


def _fill(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- value everywhere."""
    return torch.full_like(x, float(edit["value"]))


def _copy(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- another source tensor: an untied copy. ``x`` may be empty, since the tensor is new."""
    return lookup(edit["from"]).clone()


def _new(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- zeros: a tensor that the source does not have, stored beside ``like`` and in its dtype."""
    return torch.zeros(tuple(edit["shape"]), dtype=torch.float64, device=x.device)


EDITS: dict[str, Callable[[Tensor, Edit, Lookup], Tensor]] = {
    "center": _center,
    "scale": _scale,
    "add_product": _add_product,
    "fill": _fill,
    "copy": _copy,
    "new": _new,
}


def apply_edits(tensor: Tensor, edits: Sequence[Edit], lookup: Lookup) -> Tensor:
    """Apply ``edits`` in order to a copy of ``tensor`` in float64.

    Args:
        tensor: any shape, any floating dtype; for a new tensor (first edit ``copy`` or ``new``) its value is ignored.
        edits: rows of a plan, each with ``op`` naming a row of :data:`EDITS`.
        lookup: gives the *source* value of another tensor in float64.

    Returns:
        The edited tensor in float64.

    Raises:
        KeyError: an edit names an operation that is not in the table.
    """
    value = tensor.to(torch.float64)
    for edit in edits:
        value = EDITS[edit["op"]](value, edit, lookup)
    return value
