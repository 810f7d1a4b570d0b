"""Verdicts: no right result is refused, no wrong one passes."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import normconvert
from normconvert.errors import InputError
from normconvert.tracing.probes import Probe
from normconvert.verification.equivalence import verify_models
from normconvert.verification.fidelity import Distance
from normconvert.verification.moved_weights import FLOAT32, WHOLE, moved
from normconvert.verification.rounding import pooled
from tests.support.perturb import perturb

SMALL: dict[str, Any] = {"vocab_size": 64}
MASKED: dict[str, Any] = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=24, n_layer=2, n_head=3, **SMALL)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=24, n_layers=2, n_heads=3, max_seq_len=64, **SMALL)),
}


@pytest.mark.parametrize("name", MASKED)
def test_rows_without_a_finite_truth_are_left_out_and_said(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    perturb(MASKED[name]()).save_pretrained(tmp_path / "src")  # type: ignore[operator]
    fidelity = normconvert.convert(tmp_path / "src", tmp_path / "out").fidelity
    assert fidelity is not None
    assert fidelity.passed
    assert [remark for remark in fidelity.remarks if "'padded' left out" in remark]
    assert [row for row in fidelity.probes if row.get("left_out")]


class Scaled(nn.Module):
    """A linear map, and whatever a test does to its result."""

    def __init__(self, change: Any = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 16, dtype=dtype)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.change is None else self.change(y)


PROBES = [
    Probe(name, {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(i))}) for i, name in enumerate("ab")
]


def held(original: nn.Module, converted: nn.Module, edited: nn.Module | None = None, **options: Any) -> Any:
    truth = copy.deepcopy(original).double()
    return verify_models(
        truth=truth, algebra=edited or copy.deepcopy(truth), original=original, converted=converted,
        probes=PROBES, **options,
    )  # fmt: skip


def test_a_result_that_is_not_finite_where_the_original_is_fails() -> None:
    def spoil(y: Tensor) -> Tensor:
        y = y.clone()
        y[0, 0] = math.nan
        return y

    found = held(Scaled(), Scaled(spoil))
    assert not found.passed
    assert "not finite in float32" in found.reasons[0]


def test_an_original_without_a_finite_output_in_the_dtype_is_no_proof() -> None:
    def large(y: Tensor) -> Tensor:
        return y * 60000.0 * 60000.0

    model = Scaled(large).half()
    with pytest.raises(InputError, match="in float16 the original itself"):
        held(model, copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moved_weights_move_by_half_a_unit_and_back(dtype: torch.dtype) -> None:
    model = nn.Linear(300, 200, dtype=dtype)
    model.bias.data.zero_()
    before = model.weight.detach().clone()
    with moved(model, 1):
        step = (torch.nextafter(before.abs(), torch.tensor(math.inf, dtype=dtype)) - before.abs()).double()
        units = (model.weight.detach().double() - before.double()) / step
        assert units.abs().max() <= 1.0
        assert float(units.square().mean().sqrt()) == pytest.approx(0.5, abs=0.02)
        assert not model.bias.any()
    assert torch.equal(model.weight, before)
    with moved(model, 1, WHOLE):
        assert bool((model.weight != before).all())


def test_weights_in_float64_move_by_units_of_float32() -> None:
    model = nn.Linear(300, 200, dtype=torch.float64)
    before = model.weight.detach().clone()
    narrow = before.abs().float()
    with moved(model, 1, WHOLE, FLOAT32):
        step = (torch.nextafter(narrow, torch.tensor(math.inf)) - narrow).double()
        units = (model.weight.detach() - before).abs() / step
        assert float(units.median()) == 1.0
    assert torch.equal(model.weight, before)


class CastNorm(nn.Module):
    """In float32, whatever the dtype of the model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        result: Tensor = self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        return result


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.write, self.inner, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norms = nn.ModuleList(CastNorm(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        x = x + self.inner(self.norms[0](x))
        result: Tensor = self.head(self.norms[1](x))
        return result


def test_a_model_in_float64_that_casts_to_float32_is_held_to_that() -> None:
    torch.manual_seed(0)
    model, x = Casting().double().eval(), torch.randn(2, 7, 5, dtype=torch.float64)
    _, report = normconvert.convert_model(model, "rotate", example_inputs={"x": x})
    assert report.converted == 2
    assert report.fidelity is not None
    assert 0.01 < report.fidelity.rounding < 3  # type: ignore[operator]


def test_an_original_that_is_exact_by_chance_refuses_nothing() -> None:
    """In float64 the original is the truth itself."""
    model = Scaled(dtype=torch.float64)
    permuted = copy.deepcopy(model)
    permuted.change = lambda y: (y + 1.0) - 1.0
    found = held(model, permuted)
    assert found.passed, found.reasons
    assert found.remarks


def test_an_ill_conditioned_input_is_held_to_what_its_weights_do_there() -> None:
    model = Scaled()
    model.linear.bias.data.fill_(1e6)
    model.change = lambda y: y - 1e6
    edited = copy.deepcopy(model).double()
    edited.linear.weight.data *= 1.0 + 1e-15
    edited.linear.bias.data += 2e-10
    found = held(model, copy.deepcopy(model), edited)
    assert found.algebra > 1e-10
    assert found.passed, found.reasons
    assert any("ill-conditioned" in remark for remark in found.remarks)
    edited.linear.bias.data += 1e-6
    found = held(model, copy.deepcopy(model), edited)
    assert not found.passed


def test_errors_are_pooled_over_probes() -> None:
    converted = {("a", "y"): Distance(2e-6, 1.0), ("b", "y"): Distance(0.0, 1.0)}
    exact = {("a", "y"): Distance(0.0, 1.0), ("b", "y"): Distance(2e-6, 1.0)}
    assert pooled(converted, [exact], 1e-7).ratio == pytest.approx(1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verdict")
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    perturb(hf.GPT2LMHeadModel(config)).to(torch.bfloat16).save_pretrained(root / "src")  # type: ignore[operator]
    normconvert.convert(root / "src", root / "out", verify=False)
    return root / "src", root / "out"


def test_what_is_below_the_rounding_of_the_dtype_is_seen_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """eps times two changes a bfloat16 model by less than its own rounding."""
    out = tmp_path / "out"
    shutil.copytree(folders[1], out)
    record = json.loads((out / "normconvert.json").read_text())
    for edit in record["plan"]["modules"]:
        if "eps" in edit:
            edit["eps"] *= 2
    (out / "normconvert.json").write_text(json.dumps(record))
    assert normconvert.verify(*folders).passed
    found = normconvert.verify(folders[0], out)
    assert found.rounding is not None
    assert found.rounding < 3
    assert not found.passed
    assert found.reasons[0].startswith("float64 outputs differ")


@pytest.mark.parametrize("level", ["quick", "standard", "thorough"])
def test_the_level_is_said_and_says_how_many_probes(folders: tuple[Path, Path], level: str) -> None:
    found = normconvert.verify(*folders, level=level)
    assert found.passed, found.reasons
    assert found.level == level
    count = {"quick": (2, 2), "standard": (5, 7), "thorough": (7, 12)}[level]
    assert count[0] <= len({row["probe"] for row in found.probes}) <= count[1]
