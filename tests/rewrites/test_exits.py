"""Ways out of a model beside its outputs: kept as they are, or listed as what returns other values."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from normconvert import convert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.report.console import show_summary
from normconvert.report.document import report_document
from normconvert.report.html import html_report
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.exits import HEADLESS
from normconvert.verification.algebra import algebra_model
from normconvert.verification.moved_exits import kept_exits, movements
from normconvert.wording.words import EXACT
from tests.support.perturb import perturb, settle
from tests.support.zoo_cases import named_cases

TOLERANCE = 1e-10
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "avg": ("vit_base_patch16_224", {**SMALL, "global_pool": "avg"}),
    "beit": ("beit_base_patch16_224", SMALL),
    "eva": ("eva02_tiny_patch14_224", {**SMALL, "depth": 2}),
}
MAP: tuple[str, dict[str, Any]] = ("vit_base_patch16_224", {**SMALL, "global_pool": "map", "class_token": False})
CONVNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "densenet": ("densenet121", {"block_config": (2, 2), "growth_rate": 8}),
    "resnetv2": ("resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}),
    "resnet": ("resnet18", {}),
    "nextvit": ("nextvit_small", {"depths": (1, 1, 5, 1)}),
}


def models(row: tuple[str, dict[str, Any]], method: str, **options: Any) -> tuple[Plan, nn.Module, nn.Module]:
    """The plan, and the original and the converted model in float64."""
    name, arguments = row
    with torch.device("meta"):
        skeleton = timm.create_model(name, **arguments).eval()
    plan = plan_model(skeleton, Options(**options), method)
    torch.manual_seed(0)
    truth = perturb(timm.create_model(name, **arguments).eval()).double()
    settle(truth, lambda: truth(pixels(row)))
    return plan, truth, algebra_model(truth, plan)


def pixels(row: tuple[str, dict[str, Any]]) -> Tensor:
    side = row[1].get("img_size", 64)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def returned(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each way out returns."""
    with torch.no_grad():
        found = {"forward": model(x), "forward_features": model.forward_features(x)}  # type: ignore[operator]
        # What a model made with num_classes=0 returns.
        found[HEADLESS[0]] = model.forward_head(found["forward_features"], pre_logits=True)  # type: ignore[operator]
        layers = model.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
    return {**found, **{f"forward_intermediates {i}": layer for i, layer in enumerate(layers)}}


def wrong(truth: nn.Module, converted: nn.Module, x: Tensor) -> set[str]:
    """The ways out that return something else."""
    expected, found = returned(truth, x), returned(converted, x)
    return {
        name.partition(" ")[0]
        for name, value in expected.items()
        if value.shape != found[name].shape or float((found[name] - value).norm() / value.norm()) > TOLERANCE
    }


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
@pytest.mark.parametrize("name", VITS)
def test_what_comes_out_shifted_is_listed(name: str, method: str) -> None:
    plan, truth, converted = models(VITS[name], method)
    assert plan.converted
    listed = {row["door"] for row in plan.shifted_doors}
    assert wrong(truth, converted, pixels(VITS[name])) <= listed
    assert "forward_intermediates" in listed
    assert "forward" not in wrong(truth, converted, pixels(VITS[name]))
    (note,) = [note for note in plan.notes if note.startswith("forward() is exact; these return")]
    assert all(door in note for door in listed)


@pytest.mark.parametrize("method", ["fold", "rotate", "scale"])
@pytest.mark.parametrize("name", ["avg", pytest.param("eva", marks=pytest.mark.slow), "map"])
def test_what_a_model_without_its_classifier_returns_is_kept_or_listed(name: str, method: str) -> None:
    row = {**VITS, "map": MAP}[name]
    plan, truth, converted = models(row, method, power="2" if method == "scale" else None)
    assert plan.converted
    assert wrong(truth, converted, pixels(row)) <= {entry["door"] for entry in plan.shifted_doors}
    # What rotates before the classifier, or is scaled, and no norm stands between.
    if (name, method) in (("avg", "rotate"), ("map", "scale")):
        assert set(HEADLESS) <= {entry["door"] for entry in plan.shifted_doors}


@pytest.mark.slow
def test_layers_that_a_model_does_not_name_are_listed_too() -> None:
    """Its ``feature_info`` names modules that it has not; what returns them is traced instead."""
    row: tuple[str, dict[str, Any]] = ("mvitv2_tiny", {"img_size": 64})
    plan, truth, converted = models(row, "rmsnorm")
    assert wrong(truth, converted, pixels(row)) == {"forward_intermediates"}
    assert {"forward_intermediates", "features_only"} <= {entry["door"] for entry in plan.shifted_doors}


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
def test_features_are_kept_if_asked_for(method: str) -> None:
    plan, truth, converted = models(VITS["avg"], method, keep_features=True)
    assert wrong(truth, converted, pixels(VITS["avg"])) == set()
    assert plan.shifted_doors == []
    assert {v.code for v in plan.kept} == {"features"}
    assert all("--keep-features" in v.reason for v in plan.kept)


@pytest.mark.parametrize("name", [n if n != "nextvit" else pytest.param(n, marks=pytest.mark.slow) for n in CONVNETS])
def test_features_are_kept_where_norms_are_fused(name: str) -> None:
    plan, truth, converted = models(CONVNETS[name], "fuse-bn")
    assert plan.converted
    assert wrong(truth, converted, pixels(CONVNETS[name])) == set()
    assert plan.shifted_doors == []


@pytest.mark.parametrize("name", ["densenet", "resnetv2", pytest.param("nextvit", marks=pytest.mark.slow)])
def test_scales_go_through_features_if_allowed_and_that_is_said(name: str) -> None:
    plan, truth, converted = models(CONVNETS[name], "fuse-bn", through_features=True)
    found = wrong(truth, converted, pixels(CONVNETS[name]))
    assert found
    assert found <= {row["door"] for row in plan.shifted_doors}
    assert any("forward_features" in note for note in plan.notes)
    kept = models(CONVNETS[name], "fuse-bn")[0]
    assert len(kept.converted) < len(plan.converted)
    assert "features" in {v.code for v in kept.kept}


def test_hidden_states_are_listed_or_kept() -> None:
    case = named_cases()["gpt2"]
    plan = plan_model(case.skeleton())
    assert {row["door"] for row in plan.shifted_doors} == {"hidden_states"}
    assert not plan_model(case.skeleton(), Options(keep_features=True)).converted


def test_the_model_gets_its_methods_back() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", **SMALL).eval()
    before = dict(vars(model))
    plan_model(model)
    assert vars(model).keys() == before.keys()


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
def test_how_much_they_move_is_measured_and_told_everywhere(tmp_path: Path, method: str) -> None:
    perturb(named_cases()["gpt2"].build()).save_pretrained(tmp_path / "a")  # type: ignore[operator]
    report = convert(tmp_path / "a", tmp_path / "b", method=method)
    assert report.fidelity is not None
    moved = report.fidelity.moved
    assert moved.keys() == {"hidden_states"}
    assert moved["hidden_states"] == float("inf") if method == "crmsnorm" else 1e-3 < moved["hidden_states"] < 1
    told = "hidden_states" if method == "crmsnorm" else f"hidden_states (changed by {moved['hidden_states']:.2g})"
    assert any(note.startswith(EXACT) and note.endswith(f": {told}") for note in report.notes)
    assert told in (tmp_path / "b" / "README.md").read_text()
    document = report_document("convert", report)
    assert told in json.dumps(document)
    assert told in html_report(document)
    text = io.StringIO()
    show_summary(Console(width=300, file=text), report)
    assert told in text.getvalue()


def test_what_a_method_returns_is_measured(tmp_path: Path) -> None:
    plan, truth, converted = models(VITS["avg"], "rmsnorm")
    values = []
    for model in (truth, converted):
        with kept_exits(model, plan.shifted_doors, {"x": pixels(VITS["avg"])}) as found, torch.no_grad():
            model(pixels(VITS["avg"]))
        values.append(found)
    moved = movements(plan.shifted_doors, *values)
    before, after = (returned(model, pixels(VITS["avg"]))["forward_features"] for model in (truth, converted))
    assert moved["forward_features"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    assert moved["forward_intermediates"] > 1e-3


class TwoResults(nn.Module):
    """A method returns what stays and what moves."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x * self.by


def test_of_several_results_the_one_that_moves_most_is_told() -> None:
    rows, values = [{"door": "features", "output": ""}], []
    for by in (1.0, 3.0):
        model, inputs = TwoResults(by), {"x": torch.ones(2, 3)}
        with kept_exits(model, rows, inputs) as found:
            model(**inputs)
        values.append(found)
    assert movements(rows, *values) == {"features": 2.0}
