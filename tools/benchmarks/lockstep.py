"""Versions of a model that take turns within a call, layer by layer.

A machine that others use as well changes its speed by several hundredths from second to second. Calls that follow each
other meet different speeds; parts of calls that do, a few milliseconds each, meet the same. Measured with copies of one
model (GPT-2, 2 cores), medians differ by 0.5% instead of 1.4% in the same time. On a GPU a call returns before its
work is done, and compiled code has no places to leave it at.

The calls run as greenlets: functions that are left in the middle and gone on with later, within one thread, so that all
use the same pool of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from normconvert.benchmark.memory import parameter_bytes
from normconvert.benchmark.timing import ROUNDS, Step, calls_a_sample
from normconvert.benchmark.versions import own_memory

LONG_PART = 0.02
"""Seconds of a layer from which its linear maps begin parts of their own."""
MOVED = 1 << 32
"""Bytes of a model up to which its weights are moved: with more it takes long, and places matter less."""


def parts(model: nn.Module, seconds: float) -> list[nn.Module]:
    """The modules at which a call of ``seconds`` is left: the layers, and the linear maps of layers that take long."""
    lists = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    stacks = [stack for stack in lists if len(stack) > 1 and len({type(layer) for layer in stack}) == 1]
    layers = max(stacks, key=len, default=[])
    if seconds <= LONG_PART * len(layers):
        return layers
    inside = [m for layer in layers for m in layer.modules() if m is not layer and _is_linear(m)]
    return layers + inside


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2 and not isinstance(module, nn.Embedding)


def lockstep(
    models: Mapping[str, nn.Module],
    steps: Mapping[str, Step],
    seconds: float,
    quickest: float,
    between: Callable[[], None] | None = None,
    laps: int = 4,
) -> tuple[dict[str, list[float]], int]:
    """As :func:`normconvert.benchmark.timing.interleave`, on the CPU, with turns within a call.

    Args:
        models: what the steps call, by the same names.
        steps: warm.
        seconds: to spend; there are five rounds at least.
        quickest: seconds that the quickest call takes.
        between: called after equal shares of the rounds; None moves the weights.
        laps: how many shares.

    Raises:
        ImportError: greenlet (of the development tools) is not installed.
    """
    from greenlet import getcurrent, greenlet

    def leave(*_: Any) -> None:
        current: Any = getcurrent()
        # The hooks also run in what is prepared, outside any greenlet, where there is nobody to switch to.
        if current.parent is not None:
            current.parent.switch()

    names = list(steps)
    calls = calls_a_sample(steps, quickest)
    times: dict[str, list[float]] = {name: [] for name in names}

    def several(step: Step) -> None:
        for _ in range(calls):
            step.call()

    begin, lap = time.perf_counter(), 1
    with _hooked([part for model in models.values() for part in parts(model, quickest)], leave):
        for turn in range(ROUNDS[1]):
            spent = time.perf_counter() - begin
            if turn >= ROUNDS[0] and spent >= seconds:
                break
            # By time or by rounds, whichever ends first: each place in memory is to get its share of what is measured.
            if lap < laps and max(spent / seconds, turn / ROUNDS[1]) * laps >= lap:
                lap += 1
                between() if between is not None else _move(models)
            # Everybody begins equally often: what the first call of a round finds (idle cores, cold caches) is no one's
            # alone.
            first = turn % len(names)
            running = {name: greenlet(lambda n=name: several(steps[n])) for name in names[first:] + names[:first]}
            took = dict.fromkeys(names, 0.0)
            # All of them before anybody begins: what is prepared must not stand between two turns, nor be timed.
            for name in names:
                steps[name].prepare()
            while running:
                for name, one in list(running.items()):
                    start = time.perf_counter()
                    one.switch()
                    took[name] += time.perf_counter() - start
                    if one.dead:
                        del running[name]
                if running:  # who began goes last
                    name = next(iter(running))
                    running[name] = running.pop(name)
            for name in names:
                times[name].append(took[name] / calls)
    return times, calls


def _move(models: Mapping[str, nn.Module]) -> None:
    """Put all weights elsewhere in memory: where they happen to lie makes a call up to a hundredth slower or faster."""
    for model in models.values():
        if parameter_bytes(model) < MOVED:
            own_memory(model)


@contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
