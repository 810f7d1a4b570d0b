"""SpecAugment's vector is written into the stream when a model is trained: the stream is converted with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from normconvert.options import Options
from normconvert.rewrites.planning import plan_model
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


def frames(head: bool) -> Any:
    config = hf.Wav2Vec2BertConfig(**SIZES, output_hidden_size=32)
    return hf.Wav2Vec2BertForCTC(config) if head else hf.Wav2Vec2BertModel(config)


def samples(head: bool) -> Any:
    """Its convolution for positions reads the stream itself, so nothing is converted; but the vector is not why."""
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = hf.Wav2Vec2Config(**SIZES, **convolutions, **positions, do_stable_layer_norm=True)
    return hf.Wav2Vec2ForCTC(config) if head else hf.Wav2Vec2Model(config)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("make", [frames, samples])
def test_the_vector_of_masked_frames_keeps_no_stream(make: Callable[[bool], Any], head: bool) -> None:
    with torch.device("meta"):
        model = make(head).eval()
    plan = plan_model(model, Options(), "rmsnorm")
    assert not [verdict.reason for verdict in plan.kept if verdict.code == "unread"]


@pytest.mark.parametrize("head", [True, False])
def test_masked_frames_are_the_same_in_the_converted_model(head: bool) -> None:
    with torch.device("meta"):
        plan = plan_model(frames(head).eval(), Options(allow_shifted_outputs=not head), "rmsnorm")
    assert len(plan.converted) >= 8
    truth = perturb(frames(head).eval()).double()
    edited: Any = algebra_model(truth, plan)
    sound = torch.linspace(-1, 1, 2 * 7 * 160, dtype=torch.float64).sin().reshape(2, 7, 160)
    mask = torch.arange(14).reshape(2, 7) % 3 == 0

    def run(model: Any, mask: Tensor | None) -> Tensor:
        base = model.wav2vec2_bert if head else model
        with torch.no_grad():
            found: Tensor = base(sound, mask_time_indices=mask).last_hidden_state
            return model.lm_head(found) if head else found - found.mean(-1, keepdim=True)

    assert not torch.allclose(run(truth, None), run(truth, mask))
    for given in (None, mask):
        torch.testing.assert_close(run(edited, given), run(truth, given), rtol=1e-9, atol=1e-9)
