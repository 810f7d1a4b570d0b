"""What quantisers are told of a model: who reads each norm, who writes into each stream, what is paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from normconvert.cli.app import app
from normconvert.errors import InputError
from normconvert.rewrites.anatomy import FORMS, anatomy_of, awq, llm_compressor
from normconvert.tracing.model_graph import trace_model
from tests.support.basis_models import built, skeleton

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    return anatomy_of(trace_model(skeleton("llama tied")))


def test_norms_have_their_readers_and_streams_their_writers(llama: dict[str, Any]) -> None:
    readers = {norm["name"]: [row["module"].removeprefix(LAYER) for row in norm["readers"]] for norm in llama["norms"]}
    assert readers[f"{LAYER}input_layernorm"] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert readers[f"{LAYER}post_attention_layernorm"] == ["mlp.gate_proj", "mlp.up_proj"]
    assert readers["model.norm"] == ["lm_head"]
    (stream,) = llama["streams"]
    assert stream["norms"] == list(readers)
    assert {row["module"] for row in stream["writers"]} == {
        "model.embed_tokens",
        *(f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")),
    }
    assert stream["other_writers"] == stream["other_readers"] == []
    assert llama["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert [(pair["size"], pair["heads"]) for pair in llama["values"]] == [(12, [2, 4])] * 2


def test_the_forms_of_quantisers_name_modules(llama: dict[str, Any]) -> None:
    rows = {row["smooth_layer"]: row["balance_layers"] for row in awq(llama)}
    assert rows[f"{LAYER}post_attention_layernorm"] == [f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj"]
    # Two heads of values for four of queries: no scale by channel.
    assert f"{LAYER}self_attn.v_proj" not in rows
    found = llm_compressor(llama)
    assert found["left_out"] == {}
    assert len(found["norm_mappings"]) == 5
    (turned,) = found["r1"]
    assert "lm_head" in turned["weight_input"]
    assert "model.embed_tokens" in turned["weight_output"]
    assert found["r2"][0]["attn_o"] == [f"{LAYER}self_attn.o_proj"]
    assert found["r2"][0]["attn_head_dim"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(("name", "why"), [
    ("gpt2", "it is a LayerNorm"), ("gemma", "its weight is stored without"), ("olmo2", "the output of the norm"),
])  # fmt: skip
def test_what_a_quantiser_would_do_wrong_is_left_out(name: str, why: str) -> None:
    found = llm_compressor(anatomy_of(trace_model(skeleton(name))))
    assert found["r1"] == []
    assert any(why in reason for reason in found["left_out"].values())


@pytest.mark.parametrize("form", list(FORMS))
def test_inspect_writes_it(tmp_path: Path, form: str) -> None:
    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    file = tmp_path / "anatomy.json"
    said = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "model"), "--for", "rotate", "--anatomy", str(file), "--format", form]
    )
    assert said.exit_code == 0, said.output
    assert "model.layers.1.self_attn.v_proj" in file.read_text()
    assert json.loads(file.read_text())


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    import normconvert

    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with pytest.raises(InputError, match="--anatomy"):
        normconvert.inspect(tmp_path / "model", anatomy=tmp_path / "no" / "file.json")
