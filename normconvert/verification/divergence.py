"""Looking inside: where two models part, and how large the means at the converted norms' inputs are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tracing.output_paths import tensors_in
from normconvert.verification.fidelity import channel_axes, distance
from normconvert.verification.probe_runs import run_once

Call = tuple[str, int]
"""A module's path, and which of its calls in one run of the model."""


@contextmanager
def watch_inputs(
    model: nn.Module, paths: Iterable[str], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """While open, ``see`` is called with the path of each module in `paths` that runs, the module and what it reads."""

    def hook(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is not None and x.numel():
            see(path, module, x)

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            stack.enter_context(module.register_forward_pre_hook(partial(hook, path), with_kwargs=True))
        yield


@contextmanager
def watch_means(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, float]]:
    """While open, collects the largest |mean|/rms of the channels at the input of every norm in `paths`."""
    means: dict[str, float] = {}

    def see(path: str, module: nn.Module, x: Tensor) -> None:
        means[path] = max(means.get(path, 0.0), mean_over_rms(x, channel_axis(module, x)))

    with watch_inputs(model, paths, see):
        yield means


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """The axis a norm works on: what it says itself, else the one of its weight's size, else the last."""
    axis = getattr(module, "axis", None)
    if isinstance(axis, int) and -x.ndim <= axis < x.ndim:
        return axis
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1 and x.ndim >= 3:
        for candidate in (-1, 1, -3):
            if x.shape[candidate] == weight.shape[0]:
                return candidate
    return -1


def mean_over_rms(x: Tensor, axis: int) -> float:
    """Largest |mean|/rms along `axis`; positions that are all zero count as 0."""
    x = x.detach().double()
    rms = x.square().mean(axis).sqrt()
    share = torch.where(
        rms > 0, x.mean(axis).abs() / rms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(rms)
    )
    finite = share[torch.isfinite(share)]
    return float(finite.max()) if finite.numel() else 0.0


def first_divergence(truth: nn.Module, other: nn.Module, inputs: dict[str, Any], tolerance: float) -> str | None:
    """The first leaf module, in the order of execution, from which on the two models never agree again.

    Modules that a conversion changes on purpose (a centred writer, a fused convolution) differ too, but what
    follows them agrees again; outputs are compared with and without their per-token mean, which may differ.
    Towers that run one after the other (the children under the deepest common parent) are looked at apart.
    """
    traces = [_record(model, inputs) for model in (truth, other)]
    # Calls are paired in order: where the two run different modules, the pair says nothing.
    rows = [
        (path, apart(a, b) > tolerance)
        for (path, a), (other_path, b) in zip(*traces, strict=False)
        if path == other_path
    ]
    starts = [modules[agreed + 1][:2] for modules, agreed in _towers(rows) if agreed + 1 < len(modules)]
    return min(starts)[1] if starts else None


def comparable(rows: Sequence[tuple[str, bool]], *, trailing: bool) -> set[int]:
    """Which modules are meant to compute the same in both models, by position.

    Args:
        rows: (path, whether the two differ there), in the order of execution.
        trailing: whether those that differ up to a tower's end count as well; they do not where the outputs agree.

    Returns:
        All that agree; those that differ only if nothing that follows in their tower agrees again.
    """
    return {
        position
        for modules, agreed in _towers(rows)
        for i, (position, _, differs) in enumerate(modules)
        if not differs or (trailing and i > agreed)
    }


def _towers(rows: Sequence[tuple[str, bool]]) -> Iterator[tuple[list[tuple[int, str, bool]], int]]:
    """Each tower's (position, path, differs) in order, and the index in it of the last module that agrees, or -1."""
    towers: dict[str, list[tuple[int, str, bool]]] = {}
    depth = _common_depth([path for path, _ in rows])
    for position, (path, differs) in enumerate(rows):
        tower = ".".join(path.split(".")[: depth + 1])
        towers.setdefault(tower, []).append((position, path, differs))
    for modules in towers.values():
        yield modules, max((i for i, (_, _, differs) in enumerate(modules) if not differs), default=-1)


def _common_depth(paths: list[str]) -> int:
    """How many leading components all paths share."""
    depth = 0
    split = [path.split(".") for path in paths]
    while split and all(len(p) > depth + 1 and p[depth] == split[0][depth] for p in split):
        depth += 1
    return depth


@contextmanager
def watch_leaves(model: nn.Module, see: Callable[[Call, Tensor], None]) -> Iterator[None]:
    """While open, ``see`` is called with the output of every leaf module, in the order of execution.

    Args:
        model: to be run.
        see: takes the call and the first tensor that it returned, which is not copied.
    """
    counts: dict[str, int] = {}

    def hook(path: str, module: nn.Module, args: Any, output: Any) -> None:
        number = counts[path] = counts.get(path, -1) + 1
        for value in list(tensors_in(output).values())[:1]:
            see((path, number), value)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path and not any(True for _ in module.children()):
                stack.enter_context(module.register_forward_hook(partial(hook, path)))
        yield


def _record(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(path, output) of every leaf module, in the order of execution."""
    record: list[tuple[str, Tensor]] = []

    def keep(call: Call, value: Tensor) -> None:
        record.append((call[0], value.clone()))  # or what follows in place would be in it

    with watch_leaves(model, keep):
        run_once(model, inputs, torch.get_default_dtype())
    return record


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance of b from a, or that of the mean-free parts if smaller."""
    plain = distance(b, a).relative
    if a.ndim == 0 or a.shape != b.shape or a.shape[-1] < 2:
        return plain
    assert channel_axes(a)
    return min(plain, distance(b, a, shifted=True).relative)
