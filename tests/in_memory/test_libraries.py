"""Models of other libraries convert in memory, all conversions, and compute the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.errors import NothingToConvert
from normconvert.tracing.calls import calls_of, in_dtype
from normconvert.tracing.output_paths import tensors_in
from tests.support.library_models import CASES, Made, diffusers_autoencoder, diffusers_dit
from tests.support.perturb import perturb

CONVERSIONS = [(name, method) for name, (_, counts) in CASES.items() for method in counts]


def in_float64(made: Made) -> tuple[nn.Module, list[dict[str, Any]]]:
    model, example = made
    perturb(model)
    return nn.Module.to(model, torch.float64), [in_dtype(c, torch.float64) for c in calls_of(model, example)]


def outputs(model: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    """Of inputs that the conversion has not seen: samples in another order, larger by a third."""
    found: list[Tensor] = []
    with torch.no_grad():
        for call in calls:
            other = {k: (1.3 * v.flip(0) if v.is_floating_point() else v.flip(0)) for k, v in call.items()}
            found += tensors_in(model.eval()(**other)).values()
    return found


@pytest.mark.parametrize(("name", "method"), CONVERSIONS)
def test_a_converted_model_computes_the_same(name: str, method: str) -> None:
    make, counts = CASES[name]
    model, calls = in_float64(make())
    before = outputs(model, calls)
    converted, report = normconvert.convert_model(model.train(), method, example_inputs=calls, verify="quick")
    assert (report.converted, report.library) == (counts[method], "torch")
    assert converted is not model
    assert all(module.training for module in converted.modules())
    assert report.fidelity is not None
    assert report.fidelity.algebra < 1e-12
    for was, now, again in zip(before, outputs(converted, calls), outputs(model, calls), strict=True):
        assert torch.equal(was, again), "the model that was given is as it was"
        assert float((now - was).norm() / was.norm()) < 1e-11


def test_norms_that_a_condition_modulates_convert_or_stay_as_the_proof_says() -> None:
    model, calls = in_float64(diffusers_dit())
    for method in ("rmsnorm", "fold", "rotate"):
        with pytest.raises(NothingToConvert, match="none of 3 norms can be converted"):
            normconvert.convert_model(model, method, example_inputs=calls)
    assert all("norm1" in v.path or "norm3" in v.path or v.path == "norm_out" for v in _kept(model, calls))


def _kept(model: nn.Module, calls: list[dict[str, Any]]) -> list[normconvert.plan.conversion_plan.Verdict]:
    return normconvert.inspect(model, example_inputs=calls).plan.kept


def test_norms_of_groups_are_not_what_any_conversion_is_about() -> None:
    model, calls = in_float64(diffusers_autoencoder())
    for method in ("rmsnorm", "fuse-bn"):
        with pytest.raises(NothingToConvert, match="nothing to do: AutoencoderKL has no"):
            normconvert.convert_model(model, method, example_inputs=calls)
