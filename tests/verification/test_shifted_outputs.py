"""Outputs whose mean may change are named alike by the plan and by the verification, however deep they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normconvert
from normconvert.tracing.graph import trace
from normconvert.tracing.output_paths import tensors_in
from tests.support.perturb import perturb


class Nested(nn.Module):
    """Returns tensors at every depth and in every kind of container."""

    def forward(self, x: Tensor) -> Any:
        return {"first": x + 1, "deep": {"list": [x + 2, (x + 3, None, "text")]}, "past_key_values": x + 4}


def test_traced_outputs_have_the_names_of_those_that_are_compared() -> None:
    model, x = Nested(), torch.zeros(2, 3)
    graph = trace(model, {"x": x})
    traced = {name: node for node, names in graph.outputs.items() for name in names}
    assert list(tensors_in(model(x))) == ["first", "deep.list.0", "deep.list.1.0"]
    assert set(traced) == {*tensors_in(model(x)), "past_key_values"}
    assert [tuple(traced[name].args[1:]) for name in tensors_in(model(x))] == [(1,), (2,), (3,)]


def test_what_may_shift_is_data_of_the_plan_for_nested_outputs_too(tmp_path: Path) -> None:
    import transformers as hf

    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {**sizes, "vocab_size": 101, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model: Any = perturb(hf.CLIPModel(config).eval())
    model.save_pretrained(tmp_path / "in")
    report = normconvert.convert(tmp_path / "in", tmp_path / "out", allow_shifted_outputs=True)
    assert report.plan.shifted_outputs == ["vision_model_output.last_hidden_state"]
    assert "shifted outputs: vision_model_output.last_hidden_state" in report.notes
    assert normconvert.verify(tmp_path / "in", tmp_path / "out").passed
