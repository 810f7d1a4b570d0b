"""scale, of a model in memory: the power is measured on its example inputs, or given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.errors import InputError, NothingToConvert
from tests.support.perturb import perturb


class Net(nn.Module):
    """A residual stream whose values grow beyond float16."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.inner = nn.Linear(5, 8), nn.Linear(8, 8)
        self.norm, self.last, self.head = nn.RMSNorm(8, eps=1e-3), nn.RMSNorm(8, eps=1e-3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.write(x)
        h = h + self.inner(self.norm(h))
        return self.head(self.last(h))


def net(size: float) -> Any:
    model: Any = perturb(Net().eval())
    with torch.no_grad():
        for layer in (model.write, model.inner):
            layer.weight.mul_(size)
            layer.bias.mul_(size)
    return model


def test_the_power_is_measured_and_the_result_fits_into_float16() -> None:
    x = torch.randn(4, 5)
    model = net(2.0**20)
    assert not torch.isfinite(model.half()(x.half())).all()
    model = net(2.0**20)
    made, report = normconvert.convert_model(model, method="scale", example_inputs=(x,))
    assert int(report.options["power"]) >= 5
    assert any("goes up to" in note for note in report.notes)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(made(x), expected)
        half = made.half()(x.half())
    assert torch.isfinite(half).all()
    assert torch.allclose(half.float(), expected, rtol=0.02, atol=0.02)


def test_what_fits_stays_and_data_are_for_files() -> None:
    x = torch.randn(4, 5)
    with pytest.raises(NothingToConvert, match="Net: nothing to scale: the stream"):
        normconvert.convert_model(net(1.0), method="scale", example_inputs=(x,))
    with pytest.raises(InputError, match="data is for files; a model in memory"):
        normconvert.convert_model(net(1.0), method="scale", example_inputs=(x,), data="text:x")
    model = net(1.0)
    made, _ = normconvert.convert_model(model, method="scale", example_inputs=(x,), power="3")
    assert torch.equal(made.write.weight * 8, model.write.weight)
    assert made.norm.eps == model.norm.eps / 64


def test_small_weights_that_would_vanish_are_refused_by_name_here_too() -> None:
    x, half = torch.randn(4, 5), net(1.0).half()
    for verify in ("quick", False):
        with pytest.raises(InputError, match=r"tensor \S+ times 2\^-2\d loses \S+ of its size in float16: choose a"):
            normconvert.convert_model(half, "scale", example_inputs=(x.half(),), power="20", verify=verify)
    plan = normconvert.convert_model(net(1.0), "scale", example_inputs=(x,), power="20", verify=False)[1].plan
    with pytest.raises(InputError, match=r"tensor \S+ times 2\^-2\d loses \S+ of its size in float16: choose a"):
        normconvert.apply_plan(half.state_dict(), plan)
