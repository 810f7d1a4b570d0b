"""Times of several things that do the same, interleaved, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE = 0.01
"""Seconds that one sample lasts at least, if it may: several calls of something quick are timed as one."""
LONG = 0.5
"""Seconds of a call that need not be warmed up three times."""
ROUNDS = (5, 200)
"""At least, at most."""


@dataclass(frozen=True)
class Step:
    """Something to be timed.

    Attributes:
        call: once.
        prepare: what must be done before each sample, not timed.
        most: how often it may be called after one ``prepare``.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    most: int = 1 << 30


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value, itself."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    import torch  # not with the file: the reports of commands that need no torch read results

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


def sample(step: Step, calls: int, device: torch.device) -> float:
    """Seconds for one call, the mean over ``calls`` in a row."""
    # What was given to the device before would be counted here; without the second wait this would not be counted at
    # all.
    step.prepare()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step.call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def warm_up(step: Step, device: torch.device, done: int = 0) -> float:
    """Let everything happen that happens only once: compilation, choice of kernels, first allocations.

    Args:
        step: to be called three times, or twice if that takes long.
        device: to be synchronised with.
        done: calls that have been made already.

    Returns:
        Seconds of the last call.
    """
    step.prepare()
    while True:
        start = time.perf_counter()
        step.call()
        synchronize(device)
        took = time.perf_counter() - start
        done += 1
        # A step with a cache may be called `most` times only: it would write past the end.
        if done >= min(3, step.most) or (done >= 2 and took > LONG):
            return took


def calls_a_sample(steps: Mapping[str, Step], quickest: float) -> int:
    """How many calls are timed as one, if the quickest takes ``quickest`` seconds."""
    return max(1, min(math.ceil(SAMPLE / max(quickest, 1e-9)), *(step.most for step in steps.values()), 1000))


def interleave(
    steps: Mapping[str, Step], device: torch.device, seconds: float, quickest: float = math.inf
) -> tuple[dict[str, list[float]], int]:
    """Seconds for a call of each step, round by round, each round beginning with another step.

    Args:
        steps: warm.
        device: to be synchronised with.
        seconds: to spend; there are five rounds at least.
        quickest: seconds that the quickest call takes.

    Returns:
        For each step one number a round, and how many calls each of them is the mean of.
    """
    names = list(steps)
    calls = calls_a_sample(steps, quickest)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(ROUNDS[1]):
        if turn >= ROUNDS[0] and time.perf_counter() >= end:
            break
        # Everybody begins equally often: what the first call of a round finds (idle cores, cold caches) is no one's
        # alone.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(sample(steps[name], calls, device))
    return times, calls
