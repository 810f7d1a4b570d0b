"""Fair timing: everybody in turn within a round, within a call, ratios round by round, and memory at its peak."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.benchmark.compare import compare
from normconvert.benchmark.memory import peak_bytes
from normconvert.benchmark.result import Row, row_of, share_of
from normconvert.benchmark.timing import LONG, ROUNDS, Step, interleave, spread, warm_up
from normconvert.benchmark.workloads import Workload

CPU = torch.device("cpu")
FLOAT = torch.float32


def test_each_round_times_everybody_and_begins_with_another() -> None:
    seen: list[str] = []
    steps = {name: Step(lambda name=name: seen.append(name), most=1) for name in "abc"}  # type: ignore[misc]
    times, calls = interleave(steps, CPU, seconds=1e-9)
    assert calls == 1
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", ROUNDS[0])
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_quick_calls_are_timed_together_and_prepared_for_each_time() -> None:
    log: list[str] = []
    step = Step(lambda: log.append("call"), lambda: log.append("prepare"), most=7)
    _, calls = interleave({"original": step}, CPU, seconds=1e-9, quickest=1e-6)
    assert calls == 7
    assert "".join(entry[0] for entry in log) == ("p" + 7 * "c") * ROUNDS[0]


def test_what_takes_long_is_warmed_up_less() -> None:
    log: list[str] = []

    def wait() -> None:
        log.append("slow")
        time.sleep(LONG + 0.01)

    quick, slow = Step(lambda: log.append("quick")), Step(wait)
    assert warm_up(quick, CPU) < LONG < warm_up(slow, CPU, done=1)
    assert (log.count("quick"), log.count("slow")) == (3, 1)


def test_in_eager_mode_versions_take_the_turns_that_are_given() -> None:
    work = Workload("forward", 2, None, {"input": torch.ones(2, 3)})
    used: list[str] = []

    def turns(models: Any, steps: Any, seconds: float, quickest: float) -> Any:
        used.extend(models)
        return {name: [quickest] for name in steps}, 1

    models = {"original": nn.ReLU(), "bound": nn.ReLU()}
    assert compare(models, work, "eager", FLOAT, CPU, 1e-9, turns).rounds == 1
    assert used == ["original", "bound"]


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that gets slower by the round does not blur what is twice as fast in each."""
    original = [1.0, 2.0, 4.0, 8.0, 16.0]
    times = {"original": original, "converted": [t / 2 for t in original], "bound": [t / 4 for t in original]}
    row = row_of("eager", "forward", 1, 32, times, 1, {}, {})
    assert row.speedup["converted"] == spread([2.0] * 5)
    assert row.milliseconds["original"].median == 4000
    assert row.milliseconds["original"].low == 2000
    assert row.share == pytest.approx(2 / 3)
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_the_share_of_the_way_is_one_of_time_saved() -> None:
    assert share_of(2.0, 2.0) == 1
    assert share_of(1.0, 1.1) == 0
    assert share_of(1 / 0.95, 1 / 0.9) == pytest.approx(0.5)
    small = {"original": [1.0], "converted": [1.0], "bound": [0.98]}
    assert row_of("eager", "forward", 1, None, small, 1, {}, {}).share is None


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    parameter = torch.ones(1000)

    def call() -> Tensor:
        first = parameter * 2  # 4000 bytes
        second = first + 1  # 8000
        del first  # 4000
        second.add_(1)
        third = second.view(10, 100).exp()  # 8000
        return third.sum()  # 8004

    assert peak_bytes(call, CPU) == 8004
    assert peak_bytes(lambda: parameter.view(10, 100), CPU) == 0


def test_a_version_that_fails_is_named_and_the_others_count() -> None:
    class Broken(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            raise ValueError("no such size\nmore")

    work = Workload("forward", 2, None, {"input": torch.ones(2, 3)})
    row = compare({"original": nn.ReLU(), "bound": Broken()}, work, "eager", FLOAT, CPU, 1e-9)
    assert row.failures == {"bound": "ValueError: no such size"}
    assert set(row.milliseconds) == {"original"}
    row = compare({"original": Broken(), "bound": nn.ReLU()}, work, "eager", FLOAT, CPU, 1e-9)
    assert not row.milliseconds
    assert set(row.failures) == {"original"}
