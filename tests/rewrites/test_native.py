"""`rmsnorm --native`: the library's own RMSNorm model, which loads without any code of ours, or a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import save_file
from timm.layers import RmsNorm
from torch import Tensor, nn

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.sources import native_models
from tests.support.basis_models import GROUPED, logits
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import save_vit

SIZES = {"img_size": 32, "depth": 2}


def image_model(folder: Path, name: str, **arguments: Any) -> tuple[nn.Module, Path]:
    """A small model of timm in float64, with gains, biases and layer scales that are no ones and zeros."""
    torch.manual_seed(0)
    model = perturb(timm.create_model(name, **SIZES, **arguments).eval()).double()
    return model, save_vit(model, folder, SIZES)


def text_model(folder: Path, config: type[Any], kind: type[Any], **changes: Any) -> tuple[Any, Path]:
    """A small language model, perturbed."""
    torch.manual_seed(0)
    model: Any = perturb(kind(config(**{**GROUPED, **changes})).eval())
    model.save_pretrained(folder)
    return model.double(), folder


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "name", [pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow), "deit3_small_patch16_224"]
)
def test_timm_loads_its_own_rmsnorm_model(tmp_path: Path, name: str) -> None:
    model, source = image_model(tmp_path / "model", name, num_classes=7)
    report = normconvert.convert(source, tmp_path / "out", native=True)
    assert report.fidelity is not None
    assert report.fidelity.passed
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval().double()
    assert {type(loaded.get_submodule(v.path)) for v in report.plan.verdicts} == {RmsNorm}
    assert not any(isinstance(module, nn.LayerNorm) for module in loaded.modules())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        own = normconvert.load(tmp_path / "out", dtype=torch.float64)
        assert far(own(x), before) < 1e-12
        assert far(loaded(x), before) < 1e-6  # timm made it in float32
    assert normconvert.check(tmp_path / "out", source).passed
    assert not (tmp_path / "out" / "modeling_normconvert.py").exists()


def test_a_config_of_timms_old_form_is_split_for_the_argument(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = perturb(timm.create_model("test_vit", num_classes=7).eval())
    source = tmp_path / "model"
    source.mkdir()
    save_file(model.state_dict(), source / "model.safetensors")
    # What is pretrained_cfg today was the whole file once.
    size = {"input_size": [3, 160, 160], "fixed_input_size": True}
    old = {"architecture": "test_vit", "num_classes": 7, "labels": ["a"] * 7, **size}
    (source / "config.json").write_text(json.dumps(old))
    report = normconvert.convert(source, tmp_path / "out", native=True)
    assert report.fidelity is not None
    assert report.fidelity.passed
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert isinstance(loaded.norm, RmsNorm)
    assert (loaded.pretrained_cfg["label_names"], loaded.pretrained_cfg["input_size"]) == (["a"] * 7, [3, 160, 160])


FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any], str]] = {
    "olmo": (hf.OlmoConfig, hf.OlmoForCausalLM, {}, "Llama"),
    "olmo tied": (hf.OlmoConfig, hf.OlmoForCausalLM, {"tie_word_embeddings": True}, "Llama"),
    "cohere": (hf.CohereConfig, hf.CohereForCausalLM, {"logit_scale": 0.25}, "Cohere2Moe"),
    # The last layer of four sees all tokens, without positions; in the others a window slides.
    "cohere2": (
        hf.Cohere2Config, hf.Cohere2ForCausalLM, {"num_hidden_layers": 4, "sliding_window": 4}, "Cohere2Moe",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["olmo", *(pytest.param(n, marks=pytest.mark.slow) for n in [*FAMILIES][1:])])
def test_another_class_of_the_library_loads_it(tmp_path: Path, name: str) -> None:
    config, kind, changes, family = FAMILIES[name]
    model, source = text_model(tmp_path / "model", config, kind, **changes)
    report = normconvert.convert(source, tmp_path / "out", native=True, verify_level="quick")
    assert report.plan.native == f"{family}ForCausalLM"
    assert report.plan.classes == [f"{family}Model"]
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "normconvert"} & set(said)
    assert not (tmp_path / "out" / "modeling_normconvert.py").exists()
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert type(loaded) is getattr(hf, f"{family}ForCausalLM")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {type(loaded.get_submodule(v.path)).__name__ for v in report.plan.verdicts} == {f"{family}RMSNorm"}
    assert far(logits(loaded), logits(model)) < 1e-6  # of weights rounded to float32
    if name == "olmo tied":  # its last norm has no weight: centred or not, the head reads the same
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        base = hf.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float64)
        assert type(base) is getattr(hf, f"{family}Model")
        assert far(base(ids).last_hidden_state, model.model(ids).last_hidden_state) < 1e-6
    texts = [one.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True) for one in (model, loaded)]
    assert torch.equal(*texts)
    assert normconvert.check(tmp_path / "out", source).passed
    assert normconvert.verify(source, tmp_path / "out", level="quick").passed


def reasons(source: Path) -> set[str]:
    report = normconvert.inspect(source, native=True)
    assert not report.converted
    return {verdict.reason for verdict in report.plan.verdicts}


@pytest.mark.slow
def test_clipping_has_no_place_in_the_other_class(tmp_path: Path) -> None:
    _, source = text_model(tmp_path / "model", hf.OlmoConfig, hf.OlmoForCausalLM, clip_qkv=8.0)
    (why,) = reasons(source)
    assert "LlamaForCausalLM: `model.layers.0.self_attn`: nothing there is clamp" in why
    assert run(["rmsnorm", str(source), str(tmp_path / "out"), "--native"]) == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rms_norm_eps": 1e-6}, "`model.layers.0.input_layernorm` has the eps 1e-06, not 1e-05"),
        pytest.param({"hidden_act": "gelu"}, "nothing there is silu", marks=pytest.mark.slow),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9999.0}},
            "inv_freq`, which no checkpoint holds, has other values there",
        ),
        pytest.param({"intermediate_size": 57}, "has the shape", marks=pytest.mark.slow),
        pytest.param({"attention_bias": True}, "`model.layers.0.self_attn.q_proj`", marks=pytest.mark.slow),
        pytest.param({"head_dim": 24, "num_attention_heads": 2}, "has other values there", marks=pytest.mark.slow),
    ],
)
def test_a_row_that_claims_too_much_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str
) -> None:
    _, source = text_model(tmp_path / "model", hf.OlmoConfig, hf.OlmoForCausalLM)
    said = {"rms_norm_eps": native_models.EPS, "mlp_bias": False, **changes}
    row = native_models._Row("llama", "Olmo", "Llama", said)
    monkeypatch.setattr(native_models, "_TRANSFORMERS", {"olmo": (row,)})
    assert all(why in reason for reason in reasons(source)), reasons(source)


@pytest.mark.slow
def test_a_bias_that_has_nowhere_to_go_is_the_reason(tmp_path: Path) -> None:
    _, source = image_model(tmp_path / "model", "vit_tiny_patch16_224", num_classes=0)
    (why,) = reasons(source)
    assert "the bias of `norm` would have to move into what reads it: the model returns it" in why


@pytest.mark.slow
def test_what_the_table_does_not_hold_is_told(tmp_path: Path) -> None:
    _, source = text_model(tmp_path / "model", hf.GPT2Config, hf.GPT2LMHeadModel)
    (why,) = reasons(source)
    assert "there is no model of the library's own for it (--native): none of transformers is known" in why


def test_a_class_that_takes_no_norm_by_name_is_told_in_short(tmp_path: Path) -> None:
    _, folder = image_model(tmp_path / "model", "cait_xxs24_224")
    reasons = {verdict.reason for verdict in normconvert.inspect(folder, native=True).plan.kept}
    assert any(reason.endswith('norm_layer="rmsnorm": cait_xxs24_224 cannot be built so.') for reason in reasons)
    assert not any(str(tmp_path) in reason for reason in reasons)


def test_a_model_in_memory_keeps_its_class() -> None:
    with pytest.raises(InputError, match="native is for checkpoints"):
        normconvert.convert_model(hf.OlmoForCausalLM(hf.OlmoConfig(**GROUPED)), native=True)
