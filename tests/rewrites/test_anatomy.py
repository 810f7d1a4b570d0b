"""What quantisers are told of a model: who reads each norm, who writes into each stream, what is paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from normconvert.cli import run
from normconvert.cli.app import app
from normconvert.errors import InputError
from normconvert.rewrites.anatomy import FORMS, anatomy_of, awq, llm_compressor
from normconvert.tracing.graph import trace
from normconvert.tracing.model_graph import trace_model
from tests.support.basis_models import built, logits, skeleton
from tests.support.perturb import perturb

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
    assert rows[f"{LAYER}mlp.up_proj"] == [f"{LAYER}mlp.down_proj"]
    assert f"{LAYER}mlp.gate_proj" not in rows
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
    ("gpt2", "it is a LayerNorm"), ("gemma", "its weight is stored without"), ("olmo2", "a scale by channel"),
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


def test_it_goes_to_stdout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["inspect", "model", "--anatomy", "-", "--format", "awq"])
    assert json.loads(said.stdout)
    assert "RMSNorm" in said.stderr
    assert not (tmp_path / "-").exists()
    assert run(["inspect", "model", "--anatomy", "-", "--json", "-"]) == 2


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    import normconvert

    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with pytest.raises(InputError, match="--anatomy"):
        normconvert.inspect(tmp_path / "model", anatomy=tmp_path / "no" / "file.json")
    with pytest.raises(InputError, match="--format awq is a form of an anatomy"):
        normconvert.inspect(tmp_path / "model", form="awq")


def test_a_model_in_memory_has_one_too(tmp_path: Path) -> None:
    import normconvert

    file = tmp_path / "anatomy.json"
    normconvert.inspect(built("llama"), anatomy=file, form="awq")
    assert {"smooth_layer": "model.norm", "balance_layers": ["lm_head"]} in json.loads(file.read_text())


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_the_forms_name_layers_alone(name: str) -> None:
    """Experts are several tensors of one module, of which a quantiser would take none."""
    model = skeleton(name)
    anatomy = anatomy_of(trace_model(model))
    found = llm_compressor(anatomy)
    named = {module for row in awq(anatomy) for module in (row["smooth_layer"], *row["balance_layers"])}
    named |= {module for row in found["norm_mappings"] for module in row["linears"]}
    assert found["r1"] == []
    assert any("is not the weight of a layer" in why for why in found["left_out"].values())
    assert named
    assert all(hasattr(model.get_submodule(module), "weight") for module in named)


def test_a_tied_head_takes_no_scale_by_channel(llama: dict[str, Any]) -> None:
    assert "model.norm" not in {row["smooth_layer"] for row in awq(llama)}


def test_a_norm_without_a_weight_is_no_mapping_and_no_obstacle(llama: dict[str, Any]) -> None:
    first, *rest = llama["norms"]
    found = llm_compressor({**llama, "norms": [{**first, "weight": None}, *rest]})
    assert [row["norm"] for row in found["norm_mappings"]] == [norm["name"] for norm in rest]
    assert "model.layers.0.self_attn.q_proj" in found["r1"][0]["weight_input"]


class Connected(nn.Module):
    """What brings the features into the stream makes what is returned of them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.connector, self.inner = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(8) for _ in range(2))
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.connector(x)
        stream = stream + self.inner(self.norms[0](stream))
        return self.head(self.norms[1](stream)), self.connector(x.square())


def test_a_tensor_that_writes_elsewhere_too_is_named_and_its_stream_not_turned() -> None:
    with torch.device("meta"):
        model = Connected().eval()
    anatomy = anatomy_of(trace(model, {"x": torch.empty(2, 3, 6, device="meta")}))
    (stream,) = anatomy["streams"]
    assert stream["other_readers"] == ["`connector.weight` writes into it, and `connector` reads that, too"]
    found = llm_compressor(anatomy)
    assert found["r1"] == []
    assert "writes into it" in found["left_out"]["the stream that norms.0 reads"]


def test_layers_take_the_numbers_that_the_form_lets_them_take(llama: dict[str, Any]) -> None:
    model = perturb(built("llama tied")).double()
    before = logits(model)
    torch.manual_seed(0)
    for row in awq(llama):
        layer: Any = model.get_submodule(row["smooth_layer"])
        numbers = torch.rand(layer.weight.shape[0], dtype=torch.float64) + 0.5
        layer.weight.data /= numbers.view(-1, *[1] * (layer.weight.dim() - 1))
        if getattr(layer, "bias", None) is not None:
            layer.bias.data /= numbers
        for name in row["balance_layers"]:
            balance: Any = model.get_submodule(name)
            balance.weight.data *= numbers
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


class Gated(nn.Module):
    """One factor is a linear map's result, unless ``kind`` says that something else is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate, up = self.gate(x).tanh(), self.up(x)
        if self.kind == "read":
            return self.down(gate * up), up.tanh()
        if self.kind == "mixed":
            return (self.down(gate * up + gate),)
        if self.kind == "product":
            return (self.down((gate * up).tanh()),)
        if self.kind == "square":
            return (self.down(up * up),)
        return (self.down(gate * (up + 1 if self.kind == "one" else up)),)


@pytest.mark.parametrize("kind", ["", "read", "mixed", "product", "square", "one"])
def test_a_factor_that_a_linear_map_gives_alone_takes_numbers(kind: str) -> None:
    graph = trace(Gated(kind).eval().to("meta"), {"x": torch.empty(2, 3, 6, device="meta")})
    rows = {row["smooth_layer"]: row["balance_layers"] for row in awq(anatomy_of(graph))}
    assert rows == ({} if kind else {"up": ["down"]})
