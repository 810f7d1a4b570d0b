"""A decoder with a past: an engine writes the text that torch writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normconvert.errors import InputError, TraceError
from normconvert.exporting.export import export
from tests.exporting.test_inputs import SMALL, _session
from tests.support.perturb import perturb


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model: Any = perturb(LlamaForCausalLM(LlamaConfig(**SMALL, **sizes, num_attention_heads=4, num_key_value_heads=2)))
    model.save_pretrained(folder := tmp_path_factory.mktemp("llama"))
    return folder


def _greedy(model: nn.Module, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Without any past."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.slow
def test_the_text_of_100_tokens_is_that_of_torch(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    (one,) = export(llama, tmp_path / "model.onnx", with_past=True, target="onnxruntime").files
    assert one.inputs["past_key_values.1.value"] == ["batch", 2, "past_length", 8]
    assert one.varies["past_length"][0] == 0
    session, ids = _session(tmp_path / "model.onnx"), torch.tensor([[5, 9, 33]])
    past: dict[str, Any] = {
        i.name: torch.zeros(1, 2, 0, 8).numpy() for i in session.get_inputs() if i.name.startswith("past")
    }
    read = 0
    for _ in range(100):
        places = torch.arange(read, ids.shape[1])[None]
        given = {"input_ids": ids[:, read:], "attention_mask": torch.ones_like(ids), "position_ids": places}
        found = session.run(one.outputs, {**past, **{name: value.numpy() for name, value in given.items()}})
        named = dict(zip(one.outputs, found, strict=True))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        read = ids.shape[1]
        ids = torch.cat([ids, torch.from_numpy(named["logits"])[:, -1:].argmax(-1)], 1)
    expected = _greedy(LlamaForCausalLM.from_pretrained(llama).eval(), ids[:, :3], 100)
    assert len(set(expected[0].tolist())) > 3
    assert torch.equal(ids, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "operator"),
    [
        ({}, "RMSNormalization"),
        ({"target": "onnxruntime"}, "SimplifiedLayerNormalization"),
        ({"opset": 20}, "Pow"),
    ],
)
def test_a_norm_is_the_operator_that_suits_the_target(
    converted: Path, tmp_path: Path, options: dict[str, Any], operator: str
) -> None:
    import onnx

    report = export(converted, tmp_path / "model.onnx", **options)
    made = onnx.load(tmp_path / "model.onnx")
    operations = Counter(node.op_type for node in made.graph.node)
    assert operations[operator] >= 5
    assert report.files[0].opset == next(o.version for o in made.opset_import if o.domain == "")
    assert not any(node.metadata_props for node in made.graph.node)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import normconvert

    out = tmp_path_factory.mktemp("gpt2") / "rms"
    normconvert.convert("demo:gpt2", out, "rmsnorm", verify=False)
    return out


@pytest.mark.slow
def test_the_dtype_of_the_weights_is_kept(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(llama, dtype=torch.float16).save_pretrained(tmp_path / "half")
    report = export(tmp_path / "half", tmp_path / "model.pt2")
    assert report.dtype == "float16"
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert export(tmp_path / "half", tmp_path / "wide.onnx", dtype="float32").dtype == "float32"


def test_a_model_without_keys_and_values_has_no_past(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=1, state_size=4))
    model.save_pretrained(tmp_path / "mamba")
    with pytest.raises((TraceError, InputError), match=r"past|keys and values"):
        export(tmp_path / "mamba", tmp_path / "model.onnx", with_past=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mamba"]
