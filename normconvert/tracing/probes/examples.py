"""Inputs to compare two versions of a model on, made of examples: other values, other sizes, as the recipes have it.

Nothing is known of such a model but the calls that it takes. A probe that the original does not take is left out by the
verification, with what the model said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from normconvert.compat.torch import pytree
from normconvert.tracing.calls import Call
from normconvert.tracing.probes.specs import Spec
from normconvert.tracing.probes.verification import HEAVY, RECIPES, Probe, Recipe

Changed = Callable[[Tensor], Tensor]


def example_probes(calls: tuple[Call, ...], *, seed: int = 0, level: str = "standard") -> list[Probe]:
    """Probes for each of the calls: itself, random values like its own, degenerate ones, and other sizes.

    Args:
        calls: keyword arguments of ``forward``, on the CPU.
        seed: of all random values.
        level: ``quick``, ``standard`` or ``thorough``.
    """
    probes: list[Probe] = []
    for number, call in enumerate(calls):
        end = f"-{number + 1}" if number else ""
        found = [Probe(f"example{end}", call)]
        heavy = _signals(call) > HEAVY and level != "thorough"
        for recipe in RECIPES:
            if level in recipe.levels and (recipe.heavy or not heavy) and recipe.padding is None:
                found += _made(recipe, call, end, seed * 1000 + 100 * number + len(found))
        if level != "quick" and not heavy:
            found += [Probe(f"{name}{end}", _each(call, change)) for name, change in _sizes(call)]
        probes += found[:2] if level == "quick" else found
    return probes


def _made(recipe: Recipe, call: Call, end: str, seed: int) -> Iterator[Probe]:
    """The probe of a recipe, if it changes anything in this call."""
    generator = torch.Generator().manual_seed(seed)
    changed = _each(call, lambda value: _like(value, recipe, generator))
    before, after = (pytree.tree_leaves(some) for some in (call, changed))
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        yield Probe(f"{recipe.name}{end}", changed, recipe.realistic)


def _like(value: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Values as a recipe has them, of the kind, the shape and the range that ``value`` has.

    Masks stay as they are, and so do short lists of numbers such as times: what else they may be nobody knows.
    """
    if value.is_floating_point():
        if value.ndim < 2 or not bool(value.isfinite().all()):
            return value
        scale, mean = (float(value.double().std(correction=0)), float(value.double().mean()))
        if recipe.name == "random":
            return (torch.randn(value.shape, generator=generator) * (scale or 1.0) + mean).to(value.dtype)
        return recipe.signal(value) if recipe.signal is not None else value
    if value.dtype in (torch.bool, torch.uint8) or value.is_complex() or not value.numel():
        return value
    spec = Spec(tuple(value.shape), "ids", int(value.min()), int(value.max()) + 1)
    if recipe.name == "random":
        return torch.randint(spec.low, spec.high, spec.shape, generator=generator).to(value.dtype)
    return recipe.ids(value, spec).to(value.dtype) if recipe.ids is not None and value.ndim > 1 else value


def _sizes(call: Call) -> Iterator[tuple[str, Changed]]:
    """Ways to give the call other sizes: one sample more, and half of each axis that is neither the first nor channels.

    All tensors that have the size of the largest one on an axis are given the new one.
    """
    largest = max((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor)), key=lambda v: v.ndim)
    if largest.ndim:
        yield "one-more", lambda value: _one_more(value, largest.shape[0])
    axes = {2: (1,), 3: (1,)}.get(largest.ndim, tuple(range(2, largest.ndim)))
    axes = () if largest.ndim == 2 and largest.is_floating_point() else axes
    if axes and all(largest.shape[axis] > 1 for axis in axes):
        yield "half", lambda value: _half(value, {axis: largest.shape[axis] for axis in axes})


def _one_more(value: Tensor, size: int) -> Tensor:
    return torch.cat([value, value[:1]]) if value.ndim and value.shape[0] == size else value


def _half(value: Tensor, sizes: dict[int, int]) -> Tensor:
    for axis, size in sizes.items():
        if value.ndim > axis and value.shape[axis] == size:
            value = value.narrow(axis, 0, size // 2)
    return value


def _each(call: Call, change: Changed) -> dict[str, Any]:
    found: dict[str, Any] = pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, call)
    return found


def _signals(call: Call) -> int:
    """Numbers in the floating tensors of one sample."""
    shapes = [v.shape for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.is_floating_point()]
    return sum(math.prod(shape[1:]) for shape in shapes)
