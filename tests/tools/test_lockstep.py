"""Versions of a model take turns within a call, and what each takes is its own."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from normconvert.benchmark.timing import ROUNDS, Step
from tools.benchmarks.lockstep import lockstep, parts


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
