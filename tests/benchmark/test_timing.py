"""Fair timing: everybody in turn within a round, within a call, ratios round by round, and memory at its peak."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.benchmark.compare import compare
from normconvert.benchmark.lockstep import lockstep, parts
from normconvert.benchmark.memory import peak_bytes
from normconvert.benchmark.result import Row, row_of, share_of
from normconvert.benchmark.timing import LONG, ROUNDS, Step, interleave, spread, warm_up
from normconvert.benchmark.workloads import Workload, grid
from normconvert.sources import open_source

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


class Layered(nn.Module):
    """Layers that note when they run; the last of them may sleep."""

    def __init__(self, name: str, log: list[str], seconds: float = 0.0) -> None:
        super().__init__()
        self.name, self.log, self.seconds = name, log, seconds
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.log.append(f"{self.name}{i}")
        time.sleep(self.seconds)
        return x


def test_versions_take_turns_within_a_call() -> None:
    log: list[str] = []
    models = {name: Layered(name, log) for name in "ab"}
    x, results = torch.randn(2, 4), dict[str, list[Tensor]](a=[], b=[])
    expected = {name: model(x) for name, model in models.items()}
    log.clear()
    steps = {n: Step(lambda n=n: results[n].append(models[n](x)), most=1) for n in "ab"}  # type: ignore[misc]
    times, calls = lockstep(models, steps, 1e-9, 1e-3)
    assert calls == 1
    assert log[:6] == ["a0", "b0", "b1", "a1", "a2", "b2"] or log[:6] == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert len(log) == 6 * ROUNDS[0]
    assert {name: len(values) for name, values in times.items()} == {"a": ROUNDS[0], "b": ROUNDS[0]}
    assert all(torch.equal(result, expected[name]) for name in "ab" for result in results[name])
    assert not any(module._forward_pre_hooks for model in models.values() for module in model.modules())


def test_time_within_a_call_is_counted_where_it_is_spent() -> None:
    models = {"quick": Layered("q", []), "slow": Layered("s", [], seconds=0.02)}
    steps = {name: Step(lambda m=model: m(torch.zeros(1, 4))) for name, model in models.items()}  # type: ignore[misc]
    moved: list[int] = []
    times, calls = lockstep(models, steps, 0.5, 0.005, lambda: moved.append(1), laps=3)
    assert calls == 2
    assert all(0.02 <= t < 0.04 for t in times["slow"][1:4])
    assert max(times["quick"][1:4]) < 0.01
    assert len(moved) == 2


def test_an_error_within_a_call_leaves_no_hooks() -> None:
    models = {name: Layered(name, []) for name in "ab"}
    bad = models["b"].layers[1]
    bad.register_forward_hook(lambda *_: 1 / 0)
    steps = {name: Step(lambda m=model: m(torch.zeros(1, 4))) for name, model in models.items()}  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        lockstep(models, steps, 0.1, 1e-3)
    assert not any(module._forward_pre_hooks for model in models.values() for module in model.modules())


def test_long_layers_are_left_at_their_linear_maps() -> None:
    model = Layered("a", [])
    assert parts(model, 0.01) == list(model.layers)
    assert [type(part) for part in parts(model, 1.0)] == 3 * [nn.Sequential] + 3 * [nn.Linear]
    assert parts(nn.Linear(2, 2), 1.0) == []


@pytest.mark.parametrize("installed", [True, False])
def test_without_greenlet_calls_follow_each_other(
    pair: tuple[Path, Path], installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normconvert.benchmark import compare as module

    used: list[str] = []

    def noted(*arguments: Any) -> Any:
        used.append("lockstep")
        return lockstep(*arguments)

    monkeypatch.setattr(module, "lockstep", noted)
    if not installed:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    source = open_source(str(pair[0]))
    work = grid(source.skeleton(), [1], [8])[0]
    models = {"original": source.load(dtype=FLOAT).eval(), "converted": normconvert.load(pair[1]).eval()}
    row = compare(models, work, "eager", FLOAT, CPU, 0.01)
    assert row.rounds >= ROUNDS[0]
    assert used == ["lockstep"] * installed


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
