"""Models that return what their last norm gives: no rotation leaves that as it is, but another basis may be allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from normconvert.options import Options
from normconvert.plan.rotations import rotated
from normconvert.rewrites.planning import plan_model

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8}
STACKS = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPEECH = {
    **{"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 20},
    **{"max_source_positions": 30, "max_target_positions": 40, "pad_token_id": 0},
}


def text() -> nn.Module:
    return hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT, projection_dim=16))


def stacks() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(**STACKS, decoder_start_token_id=0))


def pairs() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION))


def speech() -> nn.Module:
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SPEECH))


# model -> norms; converted by default, and where what is returned may be in another basis; a reason
CASES: list[tuple[Callable[[], nn.Module], tuple[int, int, int], str]] = [
    (text, (5, 0, 5), "returns it as `last_hidden_state`"),
    (stacks, (12, 0, 12), "returns it as `encoder_last_hidden_state`"),
    (pairs, (11, 0, 10), "linalg_vector_norm in the model's own forward"),
    (speech, (12, 7, 7), "contains the result of gelu in `model.encoder`"),
]


@pytest.mark.parametrize(("make", "expected", "reason"), CASES, ids=[case[0].__name__ for case in CASES])
def test_what_stays_has_a_reason_and_the_rest_is_rotated(
    make: Callable[[], nn.Module], expected: tuple[int, int, int], reason: str
) -> None:
    with torch.device("meta"):
        model = make().eval()
    plans = [plan_model(model, Options(allow_shifted_outputs=allowed), "rotate") for allowed in (False, True)]
    assert (len(plans[0].verdicts), *(len(plan.converted) for plan in plans)) == expected
    assert any(reason in verdict.reason for plan in plans for verdict in plan.kept)


def test_no_weight_and_bias_give_a_rotated_norm_the_values_that_it_gave() -> None:
    generator = torch.Generator().manual_seed(0)
    n = functional.layer_norm(torch.randn(4096, 32, generator=generator, dtype=torch.float64), (32,))
    given = n * torch.randn(32, generator=generator, dtype=torch.float64) + 0.3
    turned = rotated(n.clone(), 1, "hadamard", 0, constant=True)
    torch.testing.assert_close(functional.layer_norm(turned, (32,)), turned, atol=1e-4, rtol=1e-4)  # a norm gives it
    assert left_by_the_best(n, given) < 1e-12
    assert left_by_the_best(turned, given) > 0.9


def left_by_the_best(x: Tensor, given: Tensor) -> float:
    """How much of what a norm gave no weight and bias give, in parts of it: by least squares, for each channel."""
    x, y = x - x.mean(0), given - given.mean(0)
    return float((y - x * ((x * y).sum(0) / (x * x).sum(0))).norm() / y.norm())
