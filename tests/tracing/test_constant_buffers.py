"""Integers that a constructor keeps in buffers which no checkpoint holds are known; any other buffer is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.tracing.constant_buffers import constant_buffers, following_integers
from normconvert.tracing.graph import trace
from normconvert.tracing.probes.asking import call_fake
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb


class Strided(nn.Module):
    """Pads as codecs do, by the numbers in its buffers."""

    size: Tensor
    missing: Tensor

    def __init__(self, persistent: bool = False, counts: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 2)
        self.counts = counts
        size = torch.tensor(5, dtype=torch.int64)
        self.register_buffer("size", size, persistent=persistent)
        self.register_buffer("missing", size - torch.tensor(3), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.missing += 1
        left = int(torch.ceil(x.shape[1] / self.size).to(torch.int64)) + int(self.missing)
        return self.down(self.norm(self.up(nn.functional.pad(x, (0, 0, left, 0)))))


def skeleton(**options: bool) -> Strided:
    with following_integers() as fill, torch.device("meta"):
        model = Strided(**options).double()
    fill(model)
    return model.eval()


def test_a_model_that_pads_by_its_constant_buffers_is_traced_and_converts() -> None:
    made = skeleton()
    assert {name: int(value) for name, value in constant_buffers(made).items()} == {"size": 5, "missing": 2}
    assert all(p.is_meta for p in made.parameters())
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    graph = trace(made, {"x": x.to("meta")})
    assert next(node for node in graph.outputs).meta["val"].shape == (2, 7 + 2 + 2, 2)
    plan = plan_rmsnorm(graph, Options())
    assert [v.path for v in plan.converted] == ["norm"]
    model = Strided().double().eval()
    perturb(model, 0)
    torch.testing.assert_close(algebra_model(model, plan)(x), model(x), rtol=1e-10, atol=1e-12)


def test_probes_run_with_the_constants() -> None:
    made = skeleton()
    assert call_fake(made, made, {"x": torch.zeros(1, 5, 4, dtype=torch.float64)}).shape == (1, 5 + 1 + 2, 2)


def test_a_buffer_that_a_checkpoint_holds_is_unknown() -> None:
    made = skeleton(persistent=True)
    assert not constant_buffers(made)
    with pytest.raises(TraceError, match="traced"):
        trace(made, {"x": torch.randn(2, 7, 4, dtype=torch.float64, device="meta")})


def test_a_buffer_that_forward_writes_to_is_no_constant() -> None:
    with pytest.raises(TraceError, match="traced"):
        trace(skeleton(counts=True), {"x": torch.randn(2, 7, 4, dtype=torch.float64, device="meta")})


def test_one_buffer_of_two_modules_is_changed_under_either_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counter, self.reader = Strided(counts=True), Strided()
            self.reader.missing = self.counter.missing

        def forward(self, x: Tensor) -> Tensor:
            self.counter(x)
            return nn.functional.pad(x, (0, 0, int(self.reader.missing), 0))

    with following_integers() as fill, torch.device("meta"):
        model = Shared().double()
    fill(model)
    assert model.reader.missing is model.counter.missing
    with pytest.raises(TraceError, match="traced"):
        trace(model.eval(), {"x": torch.randn(2, 7, 4, dtype=torch.float64, device="meta")})


def test_floating_buffers_and_what_is_made_of_unknown_values_have_no_values() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.register_buffer("angles", torch.arange(3.0), persistent=False)
            self.register_buffer("order", torch.argsort(self.weight.detach()), persistent=False)
            self.register_buffer("drawn", torch.randint(0, 9, (3,)), persistent=False)

    with following_integers() as fill, torch.device("meta"):
        model = Others()
    fill(model)
    assert not constant_buffers(model)
