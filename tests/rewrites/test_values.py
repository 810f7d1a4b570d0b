"""`rotate --values`: what attention mixes over tokens in another basis, found by who reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import normconvert
from normconvert.options import Options
from normconvert.rewrites.planning import difference, plan_model, planned
from normconvert.verification.algebra import algebra_model
from tests.support.basis import check_basis
from tests.support.basis_models import built, logits, skeleton

VALUES = Options(values=True, seed=3)
PAIRS = {"llama": 2, "vit": 2, "opt": 2, "gemma2": 2, "gpt2": 2, "gpt_neox": 2, "falcon": 2, "phi3": 2}
"""Model -> pairs of linear maps."""
BLOCKS = {"gpt2": [8, 9, 10, 11], "gpt_neox": [2, 5, 8, 11], "falcon": [5], "phi3": [6, 7]}
"""Model that keeps queries, keys and values in one tensor -> which blocks of a head's rows are values."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("llama", "gpt2") else pytest.mark.slow) for n in PAIRS]
)
def test_values_rotate_and_the_model_stays(name: str) -> None:
    plan, graph = planned(skeleton(name), VALUES, "rotate")
    plain = plan_model(skeleton(name), Options(seed=3), "rotate")
    more = [name for name, rows in plan.tensors.items() if rows != plain.tensors.get(name)]
    assert len([name for name in more if name.endswith(".weight")]) == 2 * PAIRS[name]
    assert difference(graph, plan, VALUES) == ""
    truth = built(name).double()
    expected = logits(truth)
    assert float((logits(algebra_model(truth, plan)) - expected).norm() / expected.norm()) < 1e-13
    assert name not in BLOCKS or any("blocks" in plan.tensors[tensor][-1] for tensor in more)
    for row in (plan.tensors[tensor][-1] for tensor in more):
        # With fewer heads of values than of queries there is one map for each, and readers follow.
        assert row["constant"] is False
        if "blocks" in row:
            assert row["blocks"] == BLOCKS[name]
            continue
        assert row.get("outer", 1) == (2 if name == "llama" and row["axis"] == 0 else 4)


def test_the_stock_class_loads_rotated_values(tmp_path: Path) -> None:
    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    report = normconvert.convert(tmp_path / "model", tmp_path / "out", "rotate", values=True, verify_level="quick")
    assert any(note.startswith("values are rotated between 2 pairs of linear maps") for note in report.notes)
    assert "caches hold rotated values: those of the original do not fit" in report.notes
    truth, found = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float64) for n in ("model", "out"))
    torch.testing.assert_close(logits(found), logits(truth), rtol=1e-5, atol=1e-5)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        said = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (truth, found)]
    assert torch.equal(*said)


class Attention(nn.Module):
    """Attention written by hand; ``seen`` lets somebody else read the values."""

    def __init__(self, seen: str = "") -> None:
        super().__init__()
        self.seen = seen
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.write, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(self.write(x))
        q, k, v = (f(n).unflatten(-1, (2, 4)).transpose(-2, -3) for f in (self.q, self.k, self.v))
        mixed = torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
        if self.seen == "positive":
            mixed = mixed.relu()
        if self.seen == "weight":
            n = n + self.v(self.o(n))
        y = self.o(mixed.transpose(-2, -3).flatten(-2))
        return self.head(y) + (self.v.weight.sum() if self.seen == "sum" else 0) + n.sum()


@pytest.mark.parametrize(("seen", "rotates"), [("", True), ("positive", False), ("weight", False), ("sum", False)])
def test_values_that_others_see_stay(seen: str, rotates: bool) -> None:
    inputs = [{"x": torch.randn(2, 6, 5, dtype=torch.float64)}]
    outcome = check_basis(lambda: Attention(seen), inputs, "rotate", VALUES)
    assert outcome.plan is not None
    assert not outcome.problems
    assert bool(outcome.plan.tensors.get("v.weight", [])) is rotates


def joined(model: nn.Module, layout: str) -> Tensor:
    """The bias of a map of queries, keys and values that is joined of theirs; keys have none."""
    q, v = model.get_parameter("q_bias"), model.get_parameter("v_bias")
    return torch.cat((v.clone() if layout == "joined twice" else q, torch.zeros_like(q), v))


class Fused(nn.Module):
    """Attention whose queries, keys and values are made by one map: one behind the other, by head, or mixed up."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.norm = nn.LayerNorm(8)
        self.qkv, self.o = nn.Linear(8, 24, bias="joined" not in layout), nn.Linear(8, 8)
        if "joined" in layout:
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        if "normed" in layout:
            self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.write, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = joined(self, self.layout) if "joined" in self.layout else self.qkv.bias
        made = nn.functional.linear(self.norm(self.write(x)), self.qkv.weight, bias)
        if "normed" in self.layout:
            q, k, v = made.unflatten(-1, (3, 2, 4)).unbind(-3)
            q, k = self.q_norm(q), self.k_norm(k)
            v = self.k_norm(v) if self.layout == "values normed" else v
        elif self.layout == "by head":
            q, k, v = made.unflatten(-1, (2, 12)).chunk(3, -1)
        else:
            q, k, v = (part.unflatten(-1, (2, 4)) for part in made.split(8, -1))
        if self.layout == "shifted":
            v = made[..., 14:22].unflatten(-1, (2, 4))
        if self.layout == "rounded":
            v = v.to(torch.int64).to(v.dtype)
        if self.layout == "twice":
            q = made[..., 14:22].unflatten(-1, (2, 4))
        q, k, v = (part.transpose(-2, -3) for part in (q, k, v))
        mixed = torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
        y = self.o(mixed.transpose(-2, -3).flatten(-2))
        seen = {"seen": lambda: made[..., -1:], "bias seen": lambda: self.qkv.bias[-1]}
        seen["joined, seen"] = lambda: self.v_bias[-1]
        extra = seen.get(self.layout, lambda: 0)()
        return self.head(y) + extra


@pytest.mark.parametrize(
    ("layout", "blocks"),
    [
        ("behind", [4, 5]),
        ("by head", [2, 5]),
        ("queries normed", [4, 5]),
        ("joined", [4, 5]),
        *((name, None) for name in ("shifted", "rounded", "twice", "seen", "bias seen", "values normed")),
        *((name, None) for name in ("joined twice", "joined, seen")),
    ],
)
def test_values_among_queries_and_keys_rotate_if_nobody_else_sees_them(layout: str, blocks: list[int] | None) -> None:
    inputs = [{"x": torch.randn(2, 6, 5, dtype=torch.float64)}]
    outcome = check_basis(lambda: Fused(layout), inputs, "rotate", VALUES)
    assert outcome.plan is not None
    assert not outcome.problems
    rows = {name: edits[-1].get("blocks") for name, edits in outcome.plan.tensors.items()}
    if "joined" in layout:
        assert rows.get("v_bias") == (blocks and [0, 1])
        assert "q_bias" not in rows
    else:
        assert rows.get("qkv.bias") == blocks
    assert rows.get("qkv.weight") == blocks


def test_values_take_the_kind_of_rotation_that_is_asked_for() -> None:
    plan = plan_model(skeleton("llama"), Options(values=True, rotation="random"), "rotate")
    kinds = {row["kind"] for rows in plan.tensors.values() for row in rows if row["op"] == "rotate"}
    assert kinds == {"random"}
