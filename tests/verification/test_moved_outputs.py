"""Returned hidden states in another basis, or scaled, where that is allowed: all else that is returned is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import normconvert
from normconvert.errors import NothingToConvert
from normconvert.options import Options
from normconvert.rewrites.planning import plan_model
from tests.support.basis_models import IMAGE, SIZES
from tests.support.perturb import perturb

T5 = {
    "vocab_size": 64, "d_model": 48, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
ALLOWED = Options(allow_shifted_outputs=True)


def text_tower() -> Any:
    return hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**SIZES, projection_dim=24, max_position_embeddings=16))


def t5() -> Any:
    """As T5 v1.1 is: the head is a tensor of its own."""
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 48))
    return model


def saved(model: Any, folder: Path) -> Path:
    perturb(model.eval()).save_pretrained(folder)  # type: ignore[operator]
    return folder


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_text_tower_is_rotated_but_for_the_states_that_it_returns(tmp_path: Path) -> None:
    source = saved(text_tower(), tmp_path / "model")
    with pytest.raises(
        NothingToConvert, match="returns it as `last_hidden_state`; --allow-shifted-outputs lets that change"
    ):
        normconvert.convert(source, tmp_path / "out", "rotate")
    report = normconvert.convert(source, tmp_path / "out", "rotate", allow_shifted_outputs=True, verify_level="quick")
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert report.plan.shifted_outputs == ["last_hidden_state"]
    assert "in the new basis are returned: last_hidden_state" in report.notes
    assert not report.plan.kept
    assert {row["output"] for row in report.fidelity.probes if "output" in row} == {"text_embeds"}
    before, after = (
        hf.CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float64)
        for folder in (source, tmp_path / "out")
    )
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected, found = before(ids), after(ids)
    assert off(found.text_embeds, expected.text_embeds) < 1e-5
    assert off(found.last_hidden_state, expected.last_hidden_state) > 0.1
    assert normconvert.check(tmp_path / "out", source=source).passed
    assert normconvert.verify(source, tmp_path / "out", level="quick").passed


@pytest.mark.slow
def test_both_stacks_of_an_encoder_and_decoder_are_rotated(tmp_path: Path) -> None:
    source = saved(t5(), tmp_path / "model")
    report = normconvert.convert(source, tmp_path / "out", "rotate", allow_shifted_outputs=True, verify_level="quick")
    assert not report.plan.kept
    assert report.plan.shifted_outputs == ["encoder_last_hidden_state"]
    before, after = (
        hf.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
        for folder in (source, tmp_path / "out")
    )
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected, found = (model(input_ids=ids, decoder_input_ids=ids[:, :5]) for model in (before, after))
        assert off(found.logits, expected.logits) < 1e-5
        said = [model.generate(ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True,
                               eos_token_id=None).logits for model in (before, after)]  # fmt: skip
    assert off(torch.stack(said[1]), torch.stack(said[0])) < 1e-5


def test_a_model_that_returns_nothing_else_is_refused() -> None:
    with torch.device("meta"):
        model = hf.T5EncoderModel(hf.T5Config(**T5)).eval()
    for method in ("rotate", "scale"):
        options = Options(allow_shifted_outputs=True, power="2")
        plan = plan_model(model, options, method)
        assert bool(plan.converted) is (method == "scale")
        assert not plan.shifted_outputs


def test_scaled_states_are_returned_where_that_is_allowed() -> None:
    with torch.device("meta"):
        model = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**IMAGE, projection_dim=24)).eval()
    plans = [plan_model(model, Options(power="2", allow_shifted_outputs=allow), "scale") for allow in (False, True)]
    assert any("unscaled; --allow-shifted-outputs lets that change" in v.reason for v in plans[0].kept)
    assert plans[1].shifted_outputs == ["last_hidden_state"]
    assert len(plans[1].converted) > len(plans[0].converted)
