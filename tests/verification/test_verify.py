"""Verification: right conversions pass, wrong ones fail and are located, and each figure measures what it says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from normconvert.api import verify
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.tracing.output_paths import tensors_in
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.verification.algebra import algebra_model
from normconvert.verification.divergence import mean_over_rms
from normconvert.verification.equivalence import tolerance_for, verify_models
from normconvert.verification.fidelity import Distance, distance, next_token_loss, ratio
from tests.support.equivalence import compare_models
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import talkative


def gpt2(**options: Any) -> hf.GPT2LMHeadModel:
    sizes = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 40, **options}
    config = hf.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)
    return perturb(hf.GPT2LMHeadModel(config).eval())


def vit() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32, num_classes=5)
    return perturb(model.eval())


def vit_plan() -> Plan:
    """What the conversion does to this ViT, by hand: every writer of the stream centred, every norm an RMSNorm."""
    writers = ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.proj", "mlp.fc2"))]
    center: dict[str, Any] = {"op": "center", "axis": 0}
    tensors = {f"{writer}.{leaf}": [center] for writer in writers for leaf in ("weight", "bias")}
    tensors |= {name: [{"op": "center", "axis": -1}] for name in ("cls_token", "pos_embed")}
    norms = [*(f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm1", "norm2")), "norm"]
    row = {"op": "replace", "kind": "rmsnorm", "size": 48, "eps": 1e-6, "axis": -1, "offset": 0.0, "upcast": False}
    return Plan(
        method="rmsnorm",
        tensors=tensors,
        modules=[{**row, "path": path, "weight": "weight", "bias": "bias"} for path in norms],
        verdicts=[Verdict(path, "LayerNorm", True, "", "converted") for path in norms],
    )


def stored(model: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """What a conversion of the checkpoint in `dtype` leaves behind: edited in float64, stored in `dtype`."""
    exact = copy.deepcopy(model).to(dtype).double()
    return algebra_model(exact, plan).to(dtype)


def check(plan: Plan, model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    original = copy.deepcopy(model).to(dtype)
    return verify_models(
        truth=lambda: copy.deepcopy(original).double(),
        algebra=None,
        plan=plan,
        original=original,
        converted=stored(original, plan, dtype),
        probes=verification_inputs(original),
        converted_norms=[v.path for v in plan.converted],
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_plan_passes_all_three_figures(dtype: torch.dtype) -> None:
    fidelity = check(vit_plan(), vit(), dtype)
    assert fidelity.passed, fidelity.reasons
    assert fidelity.algebra < 1e-12
    assert fidelity.rounding is not None
    assert 0.1 < fidelity.rounding < 2.0
    assert fidelity.mean_over_rms < (1e-5 if dtype is torch.float32 else 0.1)
    assert len(fidelity.probes) >= 6


@pytest.mark.parametrize(
    ("forgotten", "first"), [("blocks.0.mlp.fc2.bias", "blocks.1.norm1"), ("pos_embed", "blocks.0.norm1")]
)
def test_a_forgotten_edit_fails_and_is_located(forgotten: str, first: str) -> None:
    plan = vit_plan()
    del plan.tensors[forgotten]
    fidelity = check(plan, vit())
    assert not fidelity.passed
    assert fidelity.algebra > 1e-6
    assert fidelity.worst_module == first
    assert first in fidelity.reasons[0]


def test_a_bad_store_fails_the_weights_and_the_rounding() -> None:
    model, plan = vit(), vit_plan()
    converted = stored(model, plan, torch.float32)
    with torch.no_grad():
        converted.head.weight.mul_(1.0 + 1e-5)  # type: ignore[union-attr, operator]
    fidelity = verify_models(
        truth=copy.deepcopy(model).double(), algebra=None, plan=plan, original=model, converted=converted,
        probes=verification_inputs(model),
    )  # fmt: skip
    assert fidelity.algebra < 1e-12
    assert fidelity.rounding is not None
    assert fidelity.rounding > 2.0
    assert [reason.split()[0] for reason in fidelity.reasons] == ["stored", "rounding"]
    assert "head.weight" in fidelity.reasons[0]


def test_top1_and_kl_notice_another_model() -> None:
    model, other = vit(), perturb(vit(), seed=1)
    fidelity = verify_models(
        truth=model.double(), algebra=other.double(), original=model, converted=other,
        probes=verification_inputs(model), level="thorough",
    )  # fmt: skip
    assert fidelity.top1 < 1.0
    assert fidelity.kl > 1e-3
    assert not fidelity.passed


def test_float32_norms_widen_the_tolerance_of_the_algebra() -> None:
    assert tolerance_for(Plan("rmsnorm")) == 1e-10
    assert tolerance_for(Plan("rmsnorm", float32_norms=True)) == 1e-5


def test_tied_tensors_are_edited_once() -> None:
    truth = gpt2().double()
    center = [{"op": "center", "axis": -1}]
    model = algebra_model(truth, Plan("rmsnorm", tensors={"transformer.wte.weight": center}))
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    assert float(model.lm_head.weight.detach().mean(-1).abs().max()) < 1e-15  # type: ignore[union-attr, operator]
    assert float(truth.lm_head.weight.detach().mean(-1).abs().max()) > 1e-3


def test_a_copy_edit_unties() -> None:
    truth = gpt2().double()
    edits: list[dict[str, Any]] = [{"op": "copy", "from": "lm_head.weight"}, {"op": "center", "axis": -1}]
    model = algebra_model(truth, Plan("rmsnorm", tensors={"transformer.wte.weight": edits}))
    assert torch.equal(model.lm_head.weight, truth.lm_head.weight)  # type: ignore[union-attr, arg-type]
    assert float(model.transformer.wte.weight.detach().mean(-1).abs().max()) < 1e-15  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("reverse", [False, True])
def test_edits_look_up_source_values_in_any_order(reverse: bool) -> None:
    truth = vit().double()
    first, second = "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"
    edits = {first: [{"op": "fill", "value": 1.0}], second: [{"op": "scale", "axis": 1, "by": first}]}
    tensors = dict(reversed(edits.items())) if reverse else edits
    model = algebra_model(truth, Plan("rmsnorm", tensors=tensors))
    expected = truth.get_parameter(second) * truth.get_parameter(first)
    assert torch.allclose(model.get_parameter(second), expected, rtol=1e-15)


def test_a_plan_of_another_model_is_bad_input() -> None:
    with pytest.raises(InputError, match="is it another model"):
        algebra_model(gpt2().double(), vit_plan())


@pytest.mark.parametrize("shape", [[1 << 40], [-1], "x", [10**30, 10**30]])
def test_a_plan_takes_no_memory_that_the_model_does_not(shape: Any) -> None:
    model = gpt2().double()
    rows = [{"op": "new", "shape": shape, "like": "lm_head.weight"}]
    with pytest.raises(InputError, match=r"makes the tensor 'lm_head\.bias' of"):
        algebra_model(model, Plan("crmsnorm", tensors={"lm_head.bias": rows}))


def test_nan_in_the_truth_is_left_out_and_in_the_result_alone_is_not() -> None:
    clean = torch.tensor([1.0, 2.0])
    broken = torch.tensor([1.0, float("nan")])
    assert distance(broken, broken.clone()).relative == 0.0
    assert distance(broken, clean).relative == float("inf")
    assert distance(clean, broken) == Distance(0.0, 1.0, left_out=0.5)
    infinite = torch.tensor([1.0, float("inf")])
    assert distance(infinite, infinite.clone()).relative == 0.0
    assert distance(-infinite, infinite).relative == float("inf")


@pytest.mark.parametrize("axis", [-1, 1])
def test_shifted_outputs_are_compared_without_their_mean(axis: int) -> None:
    x = torch.randn(2, 5, 4, 7)
    y = x - x.mean(axis, keepdim=True)
    assert distance(y, x).relative > 0.1
    assert distance(y, x, shifted=True).relative < 1e-6
    assert distance(1.01 * y, x, shifted=True).relative > 0.005


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_outputs_on_which_any_two_models_agree_are_no_proof(value: float) -> None:
    model = vit()
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(value)
        model.get_parameter("head.bias").fill_(value)
    with pytest.raises(InputError, match="any two models agree"):
        check(vit_plan(), model)


def test_rounding_ratio_does_not_divide_by_luck() -> None:
    eps = torch.finfo(torch.float32).eps
    assert ratio(0.0, 0.0, eps) == 1.0
    assert ratio(eps / 5, 0.0, eps) == 1.0
    assert ratio(4 * eps, 2 * eps, eps) == pytest.approx(2.0)
    assert ratio(100 * eps, 0.0, eps) > 100.0


def test_caches_and_integers_are_no_outputs() -> None:
    output = {"logits": torch.zeros(2), "past_key_values": (torch.ones(1),), "ids": torch.ones(2, dtype=torch.int64)}
    assert list(tensors_in({**output, "hidden_states": (torch.zeros(1), torch.zeros(1))})) == [
        "logits",
        "hidden_states.0",
        "hidden_states.1",
    ]
    assert list(tensors_in(torch.zeros(3))) == ["output"]


class Picky(nn.Module):
    """Runs on one of two probes only."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > self.limit:
            raise ValueError("too large")
        return self.linear(x)


def test_a_probe_that_the_original_cannot_run_is_skipped_and_one_that_only_it_can_run_fails() -> None:
    probes = [Probe("small", {"x": torch.ones(2, 4)}), Probe("large", {"x": 10.0 * torch.ones(2, 4)})]
    picky, easy = Picky(5.0), Picky(50.0)
    easy.load_state_dict(picky.state_dict())
    forgiving = verify_models(
        truth=copy.deepcopy(picky).double(), algebra=None, original=picky, converted=easy, probes=probes
    )
    assert forgiving.passed
    assert {"probe": "large", "skipped": "ValueError: too large"} in forgiving.probes
    strict = verify_models(
        truth=copy.deepcopy(easy).double(), algebra=None, original=easy, converted=picky, probes=probes
    )
    assert not strict.passed
    assert any("'large'" in reason for reason in strict.reasons)


def test_a_probe_that_float64_cannot_run_is_named_and_without_any_nothing_is_verified() -> None:
    probes = [Probe("small", {"x": torch.ones(2, 4)}), Probe("large", {"x": 10.0 * torch.ones(2, 4)})]
    picky, easy = Picky(5.0), Picky(50.0)
    easy.load_state_dict(picky.state_dict())
    options: dict[str, Any] = {"original": easy, "converted": copy.deepcopy(easy), "plan": Plan("rmsnorm")}
    found = verify_models(truth=copy.deepcopy(picky).double(), algebra=None, probes=probes, **options)
    assert found.passed
    assert {"probe": "large", "skipped": "in float64: ValueError: too large"} in found.probes
    with pytest.raises(InputError, match=r"in float64 the original model runs on none of the probes.*too large"):
        verify_models(truth=copy.deepcopy(picky).double(), algebra=None, probes=probes[1:], **options)


def test_an_edited_model_that_stops_in_float64_fails_with_the_probe_and_the_error() -> None:
    probes = [Probe("small", {"x": torch.ones(2, 4)}), Probe("large", {"x": 10.0 * torch.ones(2, 4)})]
    picky, easy = Picky(5.0), Picky(50.0)
    easy.load_state_dict(picky.state_dict())
    found = verify_models(
        truth=copy.deepcopy(easy).double(), algebra=picky.double(), original=easy, converted=easy, probes=probes
    )
    assert not found.passed
    assert any("'large'" in reason and "too large" in reason for reason in found.reasons)


class Constant(nn.Module):
    """Adds a constant that it makes while it runs; a narrow one takes none of float64."""

    def __init__(self, narrow: bool) -> None:
        super().__init__()
        self.linear, self.narrow = nn.Linear(4, 3), narrow

    def forward(self, x: Tensor) -> Tensor:
        constant = torch.tensor(0.1)
        if self.narrow and constant.dtype == torch.float64:
            raise TypeError("float32 expected")
        return self.linear(x) + constant


def test_both_models_make_their_constants_in_the_dtype_that_the_original_takes() -> None:
    probes = [Probe("ones", {"x": torch.ones(2, 4)})]
    narrow, wide = Constant(True).double(), Constant(False).double()
    wide.load_state_dict(narrow.state_dict())
    assert compare_models(narrow, wide, probes) == {("ones", "output"): 0.0}
    assert compare_models(wide, narrow, probes) == {("ones", "output"): float("inf")}
    found = verify_models(truth=wide, algebra=narrow, original=wide, converted=copy.deepcopy(wide), probes=probes)
    assert any("'ones'" in reason and "float32 expected" in reason for reason in found.reasons)


def test_where_they_part_is_looked_for_in_the_dtype_that_the_original_takes() -> None:
    probes = [Probe("ones", {"x": torch.ones(2, 4)})]
    narrow = Constant(True).double()
    found = verify_models(
        truth=narrow, algebra=Constant(True).double(), original=narrow, converted=copy.deepcopy(narrow), probes=probes
    )
    assert found.worst_module == "linear"


def test_loss_is_that_of_the_next_token() -> None:
    ids = torch.tensor([[1, 2, 0]])
    logits = torch.full((1, 3, 4), -100.0)
    logits[0, 0, 2] = logits[0, 1, 0] = 100.0
    assert next_token_loss({"logits": logits}, {"input_ids": ids}) == pytest.approx(0.0)
    assert next_token_loss({"pooled": logits}, {"input_ids": ids}) is None


def test_mean_over_rms() -> None:
    assert mean_over_rms(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]), -1) == pytest.approx(1.0)
    assert mean_over_rms(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), -1) == 0.0


def test_compare_models_gives_an_error_for_each_probe_and_output() -> None:
    model = gpt2().double()
    errors = compare_models(model, copy.deepcopy(model), verification_inputs(model))
    assert set(errors.values()) == {0.0}
    assert ("random", "logits") in errors


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_two_checkpoints_of_one_model(tmp_path: Path) -> None:
    model = gpt2()
    a = save(model, tmp_path / "a")
    assert verify(a, save(model, tmp_path / "same")).passed
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(1.01)
    other = verify(a, save(model, tmp_path / "other"))
    assert not other.passed
    assert other.worst_module is not None
    assert other.worst_module.startswith("transformer.h.1.mlp")


def test_storage_in_a_coarser_dtype_is_no_failure(tmp_path: Path) -> None:
    model = gpt2()
    a = save(model, tmp_path / "a")
    fidelity = verify(a, save(model.bfloat16(), tmp_path / "b"), dtype=torch.bfloat16)
    assert 1e-4 < fidelity.algebra < fidelity.tolerance
    assert fidelity.passed, fidelity.reasons


def test_checkpoints_of_two_models_are_bad_input(tmp_path: Path) -> None:
    a = save(gpt2(), tmp_path / "a")
    with pytest.raises(InputError, match="expected two checkpoints of one model"):
        verify(a, save(gpt2(n_layer=1), tmp_path / "b"))
    bert = hf.BertForMaskedLM(hf.BertConfig(vocab_size=101, hidden_size=48, num_hidden_layers=1, num_attention_heads=3))
    with pytest.raises(InputError, match="BertForMaskedLM"):
        verify(a, save(bert, tmp_path / "c"))


def test_a_converted_checkpoint_is_held_to_its_plan(tmp_path: Path) -> None:
    model = gpt2()
    writers = [f"transformer.h.{i}.{name}.c_proj" for i in (0, 1) for name in ("attn", "mlp")]
    center: dict[str, Any] = {"op": "center", "axis": -1}
    row = {"op": "replace", "kind": "rmsnorm", "size": 48, "eps": 1e-5, "axis": -1, "offset": 0.0, "upcast": False}
    norms = [*(f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("ln_1", "ln_2")), "transformer.ln_f"]
    plan = Plan(
        method="rmsnorm",
        tensors={
            **{f"{writer}.{leaf}": [center] for writer in writers for leaf in ("weight", "bias")},
            "transformer.wpe.weight": [center],
        },
        modules=[
            {"op": "center", "path": "transformer.h.0", "side": "input", "key": "0", "axis": -1},
            *({**row, "path": path, "weight": "weight", "bias": "bias"} for path in norms),
        ],
        verdicts=[Verdict(path, "LayerNorm", True, "", "converted") for path in norms],
    )
    a, b = save(model, tmp_path / "a"), tmp_path / "b"
    edited = algebra_model(model.double(), Plan("rmsnorm", tensors=plan.tensors)).float()
    save(edited, b)
    record = {"format": 1, "library": "transformers", "architecture": "GPT2LMHeadModel", "plan": plan.to_json()}
    (b / "normconvert.json").write_text(json.dumps(record))
    fidelity = verify(a, b)
    assert fidelity.passed, fidelity.reasons
    assert fidelity.tolerance == 1e-10
    assert fidelity.algebra < 1e-12
    assert fidelity.mean_over_rms is not None
    assert fidelity.mean_over_rms < 1e-5
    json.dumps(fidelity.to_json())


@pytest.mark.parametrize("max_memory", [None, 4_000_000_000])
def test_code_that_comes_with_a_converted_checkpoint_runs_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_memory: int | None
) -> None:
    from transformers import dynamic_module_utils

    import normconvert

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    gpt2().save_pretrained(tmp_path / "in")
    talkative(tmp_path / "in")
    normconvert.convert(tmp_path / "in", tmp_path / "out", trust_remote_code=True, verify=False)
    found = verify(tmp_path / "in", tmp_path / "out", trust_remote_code=True, max_memory=max_memory)
    assert found.passed, found.reasons
    with pytest.raises(InputError, match="trust-remote-code"):
        verify(tmp_path / "in", tmp_path / "out")
