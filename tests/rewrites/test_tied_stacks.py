"""A table that two stacks and a head share: the head gets its own, and the number that an untied class leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites import untying
from normconvert.rewrites.comparison import prove
from normconvert.rewrites.edited_trace import Differs
from normconvert.rewrites.expected_changes import expected_changes
from normconvert.rewrites.planning import difference, plan_graph
from normconvert.rewrites.ties import scaled_heads, ties_for_good, untied_config
from normconvert.sources import open_source
from normconvert.tracing.graph import Graph, trace
from normconvert.tracing.model_graph import trace_model
from tests.support.perturb import perturb

HEAD, TABLE = "lm_head.weight", "shared.weight"
IDS = {"input_ids": torch.arange(14).reshape(2, 7), "decoder_input_ids": torch.arange(10).reshape(2, 5) + 9}


def stacks(family: str = "T5", **more: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, **more
    )
    return perturb(getattr(transformers, f"{family}ForConditionalGeneration")(config).eval())


def on_meta(**more: Any) -> Any:
    with torch.device("meta"):  # moved there, tied names would be tensors of their own
        return stacks(**more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**IDS).logits
    return found


def distance(model: Any, truth: Tensor) -> float:
    return float((logits(model) - truth).norm() / truth.norm())


def opened(folder: Path, family: str = "T5") -> Any:
    import transformers

    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace_model(on_meta())


@pytest.fixture(scope="module")
def plan(graph: Graph) -> Plan:
    return plan_graph(graph, Options(allow_shifted_outputs=True), "rotate")


def test_rotated_generates_the_same(tmp_path: Path) -> None:
    """Loaded by the library's own class, saved again, and from a config.json that does not say what it multiplies."""
    model = stacks()
    model.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    report = normconvert.convert(tmp_path / "in", tmp_path / "out", "rotate", allow_shifted_outputs=True)
    assert not report.plan.kept
    assert report.fidelity is not None
    assert report.fidelity.passed
    lazily = normconvert.verify(tmp_path / "in", tmp_path / "out", level="quick", max_memory=4_000_000_000)
    assert lazily.passed
    assert {"T5Model", "T5EncoderModel"} <= set(report.plan.shifted_classes)
    truth = opened(tmp_path / "in")
    found = opened(tmp_path / "out")
    assert distance(found, logits(truth)) < 1e-6  # its norms cast to float32
    assert torch.equal(*(m.generate(IDS["input_ids"], max_new_tokens=6, do_sample=False) for m in (truth, found)))
    found.save_pretrained(tmp_path / "again")
    assert distance(opened(tmp_path / "again"), logits(truth)) < 1e-6


@pytest.mark.parametrize(("family", "form"), [("T5", "bin"), ("MT5", "safetensors")])
def test_folded_is_exact(family: str, form: str, tmp_path: Path) -> None:
    model = stacks(family).double()
    model.save_pretrained(tmp_path / "in")
    if form == "bin":  # holds the table under all its names
        (tmp_path / "in" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    normconvert.convert(tmp_path / "in", tmp_path / "out", "fold", verify=False)
    assert HEAD in open_source(str(tmp_path / "out")).tensors
    assert distance(opened(tmp_path / "out", family), logits(model)) < 1e-14


def test_folded_in_memory_is_exact(tmp_path: Path) -> None:
    model = stacks().double()
    truth = logits(model)
    model, _ = normconvert.convert_model(model, "fold")
    assert distance(model, truth) < 1e-14
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert distance(opened(tmp_path), truth) < 1e-14


def test_the_head_takes_the_number_that_is_left_out(plan: Plan) -> None:
    row = {"op": "scale", "by": 32**-0.5, "axis": 1}
    assert row in plan.tensors[HEAD]
    assert plan.tensors[HEAD][0] == {"op": "copy", "from": TABLE}
    assert plan.aliases[TABLE] == [TABLE, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    assert plan.config == {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    assert plan.notes.count(f"`{TABLE}` and `{HEAD}` are no longer tied: the output has one table more.") == 1


def test_a_class_that_ties_again_is_said_to(graph: Graph, plan: Plan) -> None:
    assert "resize_token_embeddings" in plan.untraced_doors
    model: Any = graph.modules[""]
    assert ties_for_good(model)


def test_the_comparison_sees_the_number(graph: Graph, plan: Plan) -> None:
    options = Options(allow_shifted_outputs=True)
    assert difference(graph, plan, options) == ""
    rows = [row for row in plan.tensors[HEAD] if not isinstance(row.get("by"), float)]
    for other in ([], [{"op": "scale", "by": 32**-0.4, "axis": 1}]):
        wrong = Plan("rotate", tensors={**plan.tensors, HEAD: [*rows, *other]}, config=plan.config)
        with pytest.raises(Differs, match=r"mul .* becomes `lm_head`"):
            prove(graph, wrong, expected_changes(graph, wrong))
    stays = Plan("rotate", tensors=plan.tensors, config={"tie_word_embeddings": False, "scale_decoder_outputs": True})
    with pytest.raises(Differs, match="`lm_head` becomes mul"):
        prove(graph, stays, expected_changes(graph, stays))


def test_a_class_that_multiplied_nothing_gives_no_number() -> None:
    """Its config said so before, and its head is tied all the same."""
    model = on_meta(tie_word_embeddings=False)
    assert not model.config.scale_decoder_outputs
    plan = plan_graph(trace_model(model), Options(), "fold")
    assert [row["op"] for row in plan.tensors[HEAD]] == ["copy", "scale"]
    assert untied_config(model) == {"tie_word_embeddings": False, "scale_decoder_outputs": False}


def test_a_number_that_stays_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the class sets the key that ties to true for good, and multiplies by that."""
    monkeypatch.setattr(untying, "untied_config", lambda model: {"tie_word_embeddings": False})
    graph = trace_model(on_meta())
    plan = plan_graph(graph, Options(), "fold")
    assert [row["op"] for row in plan.tensors[HEAD]] == ["copy", "scale"]
    assert difference(graph, plan, Options()) == ""


class Scaled(nn.Module):
    """A tied head behind a number; what it reads is returned, too, or read by another map, or none of these."""

    def __init__(self, seen: str) -> None:
        super().__init__()
        self.seen = seen
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.other = nn.Linear(8, 3)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Any:
        y = self.table(ids).tanh() * 0.25
        more = {"returned": lambda: y, "read": lambda: self.other(y), "alone": lambda: self.other(ids.double())}
        return (self.head(y), more[self.seen]()) if self.seen != "alone" else self.head(y)


@pytest.mark.parametrize(("seen", "found"), [("alone", ["head.weight"]), ("returned", []), ("read", [])])
def test_a_number_that_others_see_is_none_of_the_heads(seen: str, found: list[str]) -> None:
    with torch.device("meta"):
        model = Scaled(seen).double()
    graph = trace(model, {"ids": torch.zeros(2, 3, dtype=torch.long, device="meta")})
    assert list(scaled_heads(graph)) == found
