"""How large the values of streams are: a model is run, and what passes the boundaries of its modules is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.runtime import Center
from normconvert.tracing.in_place_writes import Boundary
from normconvert.tracing.probes import Probe
from normconvert.verification.divergence import watch_inputs
from normconvert.verification.probe_runs import run_model


class _Watch(Center):
    """Looks at a tensor where :class:`Center` would change it."""

    def __init__(self, side: str, key: str, see: Callable[[Tensor], None]) -> None:
        super().__init__(side, key, -1, optional=True)
        self._see = see

    def change(self, x: Tensor) -> Tensor:
        """The same tensor."""
        self._see(x)
        return x


@dataclass
class Sizes:
    """What was seen.

    Attributes:
        largest: stream -> its largest absolute value.
        smallest: norm -> the smallest mean square (for LayerNorm variance) of what it read.
        inputs: how many inputs were run.
    """

    largest: dict[str, float] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    inputs: int = 0


def measure_streams(
    model: nn.Module,
    probes: Iterable[Probe],
    places: Mapping[str, Iterable[Boundary]],
    norms: Mapping[str, tuple[int, bool]],
) -> Sizes:
    """Run all probes and look at streams and norms.

    Args:
        model: in a dtype that holds all its values.
        probes: those that it cannot take are passed over.
        places: stream -> module boundaries that its values pass.
        norms: path -> the axis that it works on, and whether it subtracts the mean.

    Raises:
        InputError: it runs on none of them, or a value is not finite.
    """
    sizes, probes = Sizes(), list(probes)

    def seen(name: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if x.is_floating_point() and x.numel():
                # As Python's max does, a comparison with NaN would keep what was there.
                sizes.largest[name] = _larger(sizes.largest.get(name, 0.0), float(x.detach().abs().max()))

        return see

    def read(path: str, module: nn.Module, x: Tensor) -> None:
        axis, centred = norms[path]
        wide = x.detach().double()
        square = wide.var(axis, correction=0) if centred else wide.square().mean(axis)
        sizes.smallest[path] = min(sizes.smallest.get(path, math.inf), float(square.min()))

    with ExitStack() as stack, watch_inputs(model, norms, read):
        for name, keys in places.items():
            for path, side, key in sorted(keys):
                stack.enter_context(_hooked(model.get_submodule(path), _Watch(side, key, seen(name))))
        run = run_model(model, probes, dtype=torch.float32)
    if not run.outputs:
        reason = next(iter(run.failures.values()), "there are no inputs")
        raise InputError(f"the streams cannot be measured: the model runs on no input ({reason}); say --power")
    if bad := next((name for name, size in sizes.largest.items() if not math.isfinite(size)), None):
        raise InputError(f"the stream that `{bad}` reads has values that are not finite: no power of two mends that")
    sizes.inputs = len(run.outputs)
    return sizes


def _larger(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def _hooked(module: nn.Module, hook: _Watch) -> Any:
    if hook.side == "output":
        return module.register_forward_hook(hook)
    return module.register_forward_pre_hook(hook, with_kwargs=True)
