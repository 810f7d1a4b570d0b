"""The arithmetic a plan may ask for on one tensor: a table of operations, applied in float64.

A plan never holds code. It names tensors and lists, for each, operations from :data:`EDITS`; this module is the only
place that gives them a meaning, and it is used alike by the streaming writer and by the float64 verification.

What a tensor is multiplied by or what is added to it is a vector expression (see :mod:`normconvert.plan.vectors`).

A channel axis may be one factor of a tensor dimension (``outer * size * inner``), as when a fused projection holds
several blocks of channels; ``axis`` is the dimension, ``outer`` and ``inner`` the other factors (1 if plain).

An edit with ``part``: [dimension, start, stop] is one of that part of the tensor alone, which keeps its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normconvert.errors import InputError
from normconvert.plan.rotations import rotated
from normconvert.plan.vectors import evaluate, names_in, with_limits
from normconvert.runtime import BASES, compress

Edit = Mapping[str, Any]
Lookup = Callable[[str], Tensor]
"""Returns a *source* tensor (not edited) by its name in the model, in any floating dtype."""

REFERENCES = ("by", "weight", "from", "like")
"""Keys of an edit that name other tensors."""
SMALL = 1 << 17
"""Elements of a tensor that is kept while others are edited: vectors, which many edits look up."""
BLOCK = 1 << 18
"""Elements of a large tensor that are turned into float64 at a time: they stay in the cache, or nearly."""


def _split(x: Tensor, edit: Edit) -> tuple[Tensor, int, tuple[int, ...]]:
    """View dimension ``axis`` as (outer, size, inner); returns the view, the channel dimension in it, the old shape."""
    axis = int(edit["axis"]) % x.ndim
    outer, inner = int(edit.get("outer", 1)), int(edit.get("inner", 1))
    shape = tuple(x.shape)
    size = shape[axis] // (outer * inner)
    if size * outer * inner != shape[axis]:
        raise ValueError(f"dimension {axis} of shape {shape} is not {outer} x size x {inner}")
    # A view where the memory permits, else a copy: so callers return what they changed, and never rely on x.
    return x.reshape(*shape[:axis], outer, size, inner, *shape[axis + 1 :]), axis + 1, shape


def _center(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- P x along the channels, P = I - 11'/d (arXiv 2305.14858, eq. 7)."""
    view, dim, shape = _split(x, edit)
    # In place, since fresh memory costs more than the arithmetic; the mean is complete before anything is written.
    return view.sub_(view.mean(dim, keepdim=True)).reshape(shape)


def _vector(view: Tensor, dim: int, vector: Tensor) -> Tensor:
    """``vector`` shaped to broadcast along ``dim`` of ``view``."""
    shape = [1] * view.ndim
    shape[dim] = view.shape[dim]
    return vector.reshape(shape)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Dimension 0 of a grouped convolution's weight, split: (groups, dimension 0 / groups, dimension 1, kernel...)."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _scale(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- (by + offset) * x along the channels: a layer scale or a norm's weight moving into a linear map.

    ``start`` is the first channel that is scaled (0), if they are fewer than the axis has. With ``groups``, dimension
    ``axis`` = 1 of a grouped convolution's weight continues dimension 0: channel c is entry c % n of group c // n.
    """
    vector = evaluate(edit["by"], lookup) + float(edit.get("offset", 0.0))
    groups = int(edit.get("groups", 1))
    if groups > 1 and int(edit["axis"]) == 1:
        view = _grouped(x, groups)
        return (view * vector.reshape(groups, 1, -1, *[1] * (x.ndim - 2))).reshape(x.shape)
    view, dim, shape = _split(x, edit)
    start, count = int(edit.get("start", 0)), vector.numel()
    if vector.ndim and count != view.shape[dim]:
        if not 0 <= start <= start + count <= view.shape[dim]:
            raise ValueError(f"{count} channels from {start} do not fit dimension {edit['axis']} of shape {shape}")
        view.narrow(dim, start, count).mul_(_vector(view.narrow(dim, start, count), dim, vector))
        return view.reshape(shape)
    return view.mul_(_vector(view, dim, vector) if vector.ndim else vector).reshape(shape)


def _divide(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- x / by along the channels, zero where both are: a norm's bias that stays where its weight has gone."""
    view, dim, shape = _split(x, edit)
    divisor = _vector(view, dim, evaluate(edit["by"], lookup))
    zero = divisor == 0
    if x.device.type != "meta" and bool((zero & (view != 0)).any()):
        raise ValueError(f"{int((zero & (view != 0)).sum())} numbers of it are to be divided by zeros")
    return view.div_(torch.where(zero, torch.ones_like(divisor), divisor)).reshape(shape)


def _times(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- (x + offset) 2^exponent - offset everywhere: what writes into a stream that takes a power of two.

    ``offset`` (0) is what the model adds to the stored numbers, as in a norm that applies 1 + weight.
    """
    offset = float(edit.get("offset", 0.0))
    factor = 2.0 ** int(edit["exponent"])
    return x.mul_(factor) if offset == 0 else x.add_(offset).mul_(factor).sub_(offset)


def _shift(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- x + by along the channels: an affine norm's shift moving into the bias before it."""
    view, dim, shape = _split(x, edit)
    vector = evaluate(edit["by"], lookup)
    return view.add_(_vector(view, dim, vector) if vector.ndim else vector).reshape(shape)


def _add_product(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """b <- b + W v: a norm's bias v moving through the linear map W (v along ``axis`` of W) into the bias b.

    Further dimensions of W (a kernel's) are summed: v is the same at all their places. ``outer``, ``inner``, ``start``
    and ``groups`` as for ``scale``; ``of`` is the part of the weight that is W, as ``part`` is of b.
    """
    weight, vector = _part(lookup(edit["weight"]), edit.get("of")), evaluate(edit["by"], lookup)
    axis, groups = int(edit["axis"]), int(edit.get("groups", 1))
    if groups > 1:
        along = (groups, 1, -1) if axis == 1 else (groups, -1, 1)
        weight = _grouped(weight.to(torch.float64), groups) * vector.reshape(*along, *[1] * (weight.ndim - 2))
        gone = tuple(d for d in range(1, weight.ndim) if d != (1 if axis == 1 else 2))
        return x + weight.sum(dim=gone).reshape(x.shape)
    out, start = int(edit.get("out", 0 if axis else 1)), int(edit.get("start", 0))
    # Then each result is a row, and any number of rows can be done at a time: the bits do not depend on how many.
    weight = weight.movedim(out, 0)
    # What came before `out` has moved back by one.
    at = {**edit, "axis": axis + (out > axis)}
    sums = []
    for rows in weight.split(max(1, BLOCK * weight.shape[0] // max(1, weight.numel()))):
        view, dim, _ = _split(rows.to(torch.float64, copy=True), at)
        view = view.narrow(dim, start, vector.numel())
        sums.append(view.mul_(_vector(view, dim, vector)).flatten(1).sum(1))
    return x + torch.cat(sums).reshape(x.shape)


def _part(x: Tensor, part: Sequence[int] | None) -> Tensor:
    """The part of a tensor that an edit is of: [dimension, start, stop]; all of it if there is none."""
    if part is None:
        return x
    dim, start, stop = (int(n) for n in part)
    if not (0 <= dim < x.ndim and 0 <= start < stop <= x.shape[dim]):
        raise ValueError(f"shape {tuple(x.shape)} has no part {start} to {stop} along dimension {dim}")
    return x.narrow(dim, start, stop - start)


def _fill(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- value everywhere."""
    return torch.full_like(x, float(edit["value"]))


def _copy(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- another source tensor: an untied copy. ``x`` may be empty, since the tensor is new."""
    # Copied even if it is in float64: what is looked up is shared, and the edits to come may write over this.
    return lookup(edit["from"]).to(torch.float64, copy=True)


def _new(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- zeros: a tensor that the source does not have, stored beside ``like`` and in its dtype."""
    return torch.zeros(tuple(edit["shape"]), dtype=torch.float64, device=x.device)


def _bound(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- by, in the shape of x: the bounds of a clamp, say, infinite where there is none."""
    # Cloned, since expanded values are one in memory and cannot be edited on.
    return evaluate(edit["by"], lookup, bound=True).to(x.device).expand(x.numel()).reshape(x.shape).clone()


def _add_kernel(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- x + by * W: a branch's kernel W, scaled per output channel, in place ``at`` of a larger kernel.

    Without ``weight``, W is the identity: one tap from each channel to itself.
    """
    scale = evaluate(edit["by"], lookup)
    x = x.clone()
    at = [int(n) for n in edit["at"]]
    if "weight" in edit:
        weight = lookup(edit["weight"])
        inside = x
        for dim, (start, count) in enumerate(zip(at, weight.shape[2:], strict=True), start=2):
            inside = inside.narrow(dim, start, count)
        inside += weight * (scale.reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale)
        return x
    channels = torch.arange(x.shape[0], device=x.device)
    tap = x
    for start in at:
        tap = tap.select(2, start)
    # The channels of a group are counted from its first.
    tap[channels, channels % x.shape[1]] += scale
    return x


def _compress(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- B x along the channels: what writes into a stream that is stored in one channel less."""
    view, dim, shape = _split(x, edit)
    view = compress(view, dim, edit["basis"])
    return _merge(view, dim, edit, shape)


def _reads_compressed(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """W <- W L along the channels it reads, (W L)_j = (w_j - c sum_i<d w_i - e w_d) / s: see ``runtime.BASES``."""
    view, dim, shape = _split(x, edit)
    size = view.shape[dim]
    scale, _, _, head, last = BASES[edit["basis"]](size)
    first = view.narrow(dim, 0, size - 1)
    shift = view.narrow(dim, size - 1, 1) * last
    if head:
        shift = shift + first.sum(dim, keepdim=True) * head
    return _merge((first - shift) / scale, dim, edit, shape)


def _rotate(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- Q x along the channels, Q orthogonal: a writer's, or W <- W Q' of what reads them (`plan.rotations`).

    With ``blocks`` only those of the ``outer`` blocks of channels take it.
    """
    view, dim, shape = _split(x, edit)
    settings = edit["kind"], int(edit["seed"]), bool(edit["constant"])
    if "blocks" not in edit:
        return rotated(view, dim, *settings).reshape(shape)
    blocks = torch.tensor([int(n) for n in edit["blocks"]], device=x.device)
    if not all(0 <= int(n) < view.shape[dim - 1] for n in edit["blocks"]):
        raise ValueError(f"dimension {edit['axis']} of shape {shape} has no blocks {edit['blocks']}")
    return view.index_copy(dim - 1, blocks, rotated(view.index_select(dim - 1, blocks), dim, *settings)).reshape(shape)


def _normed(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- y sqrt(eps / (1 - mean(y^2))) along the channels: y = by * n(x) / c, n the norm without a weight.

    A norm with this eps and the weight c gives c y for that. c is ["power_above", by], so that mean(y^2) <= 1 / 2; with
    ``centred`` n is of LayerNorm, and y without its mean.
    """
    view, dim, shape = _split(x, edit)
    gain, eps, centred = evaluate(edit["by"], lookup), float(edit["eps"]), bool(edit["centred"])
    if centred:
        view = view - view.mean(dim, keepdim=True)
    view = view * (view.square().mean(dim, keepdim=True) + eps).rsqrt()
    view = view * _vector(view, dim, gain / evaluate(["power_above", edit["by"]], lookup))
    if centred:
        view = view - view.mean(dim, keepdim=True)
    return (view * (eps / (1.0 - view.square().mean(dim, keepdim=True))).sqrt()).reshape(shape)


def _merge(view: Tensor, dim: int, edit: Edit, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``_split`` for a view whose channels are fewer."""
    axis = int(edit["axis"]) % len(shape)
    size = view.shape[dim - 1] * view.shape[dim] * view.shape[dim + 1]
    return view.reshape(*shape[:axis], size, *shape[axis + 1 :])


def _drop(x: Tensor, edit: Edit, lookup: Lookup) -> Tensor:
    """x <- x without its last channel: a layer scale that has become ones."""
    view, dim, shape = _split(x, edit)
    return _merge(view.narrow(dim, 0, view.shape[dim] - 1), dim, edit, shape)


# Each may overwrite the tensor it is given, which is a copy: fresh memory costs more than the arithmetic.
EDITS: dict[str, Callable[[Tensor, Edit, Lookup], Tensor]] = {
    "center": _center,
    "scale": _scale,
    "divide": _divide,
    "times": _times,
    "shift": _shift,
    "add_product": _add_product,
    "fill": _fill,
    "copy": _copy,
    "new": _new,
    "bound": _bound,
    "add_kernel": _add_kernel,
    "compress": _compress,
    "read_compressed": _reads_compressed,
    "drop": _drop,
    "rotate": _rotate,
    "normed": _normed,
}


def apply_edits(tensor: Tensor, edits: Sequence[Edit], lookup: Lookup, *, own: bool = False) -> Tensor:
    """Apply ``edits`` in order to a copy of ``tensor`` in float64.

    Args:
        tensor: any shape, any floating dtype; for a new tensor (first edit ``copy`` or ``new``) its value is ignored.
        edits: rows of a plan, each with ``op`` naming a row of :data:`EDITS`.
        lookup: gives the *source* value of another tensor.
        own: ``tensor`` is in float64 already and may be overwritten: no copy is made.

    Returns:
        The edited tensor in float64.

    Raises:
        KeyError: an edit names an operation that is not in the table.
    """
    value = tensor if own else tensor.to(torch.float64, copy=True)
    for edit in edits:
        if "part" in edit:
            part = _part(value, edit["part"])
            made = EDITS[edit["op"]](part.clone(), edit, lookup)
            if made.shape != part.shape:
                raise ValueError(f"{edit['op']} gives a part of another shape: {tuple(made.shape)}")
            part.copy_(made)
        else:
            value = EDITS[edit["op"]](value, edit, lookup)
    return value


def referred(edit: Edit) -> Iterator[str]:
    """Names of the tensors that an edit reads besides the one it edits."""
    for key in REFERENCES:
        if key in edit:
            yield from names_in(edit[key])


def edited_shape(
    shape: Sequence[int], edits: Sequence[Edit], shape_of: Callable[[str], Sequence[int]]
) -> tuple[int, ...]:
    """The shape after the edits, found by applying them to tensors without values.

    Args:
        shape: before them.
        edits: rows of a plan.
        shape_of: gives the shape of another source tensor.

    Raises:
        ValueError: the edits do not fit; or RuntimeError, IndexError, KeyError.
    """

    def lookup(name: str) -> Tensor:
        return torch.empty(tuple(shape_of(name)), dtype=torch.float64, device="meta")

    return tuple(apply_edits(torch.empty(tuple(shape), device="meta"), edits, lookup).shape)


def refuse_oversized(name: str, rows: Sequence[Edit], largest: int) -> None:
    """Refuse a new tensor that is larger than any of the model, before memory is taken for it.

    Args:
        name: of the tensor.
        rows: of a plan, which may come from anywhere.
        largest: elements of the model's largest tensor; what a conversion adds is a bias or a copy.

    Raises:
        InputError: it is larger.
    """
    for row in rows:
        shape = row.get("shape", ()) if row.get("op") == "new" else ()
        if not isinstance(shape, (list, tuple)) or any(type(n) is not int or n < 0 for n in shape):
            raise InputError(f"the plan makes the tensor {name!r} of a shape that is none: {str(shape)[:60]}")
        if math.prod(shape) > largest:
            found = f"{math.prod(shape):,} elements; the model's largest has {largest:,}"
            raise InputError(f"the plan makes the tensor {name!r} of {found}: is it another model's?")


def limited(rows: Sequence[Edit], limit: Callable[[str], float]) -> tuple[Edit, ...]:
    """The edits with the largest numbers of the tensors' dtypes in them: see `normconvert.plan.vectors`."""
    return tuple({**row, "by": with_limits(row["by"], limit)} if "by" in row else row for row in rows)
