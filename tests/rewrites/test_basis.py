"""`fold` and `rotate` on the models that they are for: the same function, in the library's own class."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
)

import normconvert
from normconvert.errors import InputError, NothingToConvert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.report.loading import how_to_load
from normconvert.rewrites.planning import difference, plan_model, planned
from normconvert.rewrites.registry import REWRITES
from normconvert.sources import open_source
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.basis import check_basis
from tests.support.basis_models import IMAGE, MODELS, built, logits, skeleton
from tests.support.equivalence import check

BASES = ["rotate", "scale"]
"""Conversions of whole streams."""

COUNTS = {
    "cohere": {"fold": (3, 0), "rotate": (3, 0)},
    "falcon": {"fold": (3, 0), "rotate": (3, 0)},
    # The norm behind its table writes into the stream.
    "bloom": {"fold": (5, 1), "rotate": (6, 0)},
    # Those of what queries, keys and values are made of read a part of what is made.
    "deepseek_v2": {"fold": (7, 2), "rotate": (7, 2)},
    "deepseek_v3": {"fold": (7, 2), "rotate": (7, 2)},
    # Norms without weights have nothing to fold.
    "olmo": {"fold": (0, 5), "rotate": (5, 0)},
    # The norms of queries and keys are read by rotations of positions.
    "qwen3": {"fold": (5, 4), "rotate": (5, 4)},
    # Their branches end in a norm that writes into the stream.
    "gemma2": {"fold": (5, 4), "rotate": (0, 9)},
    "olmo2": {"fold": (1, 8), "rotate": (0, 9)},
}
"""Model -> how many norms are converted and how many stay; (5, 0) where none is named."""


def some(names: Iterable[str], quick: set[str]) -> list[Any]:
    """The models, of which a few are enough where time is short."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("method", ["fold", "rotate"])
@pytest.mark.parametrize("name", some(MODELS, {"llama tied", "gemma", "gpt2"}))
def test_the_model_computes_the_same_in_float64(name: str, method: str) -> None:
    options = Options(seed=3)
    plan, graph = planned(skeleton(name), options, method)
    found = (len(plan.converted), len(plan.kept))
    assert found == COUNTS.get(name, {}).get(method, (5, 0)), [(v.path, v.reason) for v in plan.kept]
    assert not plan.modules
    assert difference(graph, plan, options) == ""
    truth = built(name).double()
    edited = algebra_model(truth, plan)
    expected, result = logits(truth), logits(edited)
    assert float((result - expected).norm() / expected.norm()) < 1e-13
    # That it is another model is what makes the sameness of its outputs say something.
    assert not plan.converted or any(
        not torch.equal(a, b) for a, b in zip(truth.parameters(), edited.parameters(), strict=False)
    )


def test_a_norm_at_the_end_of_a_branch_is_the_reason() -> None:
    plan = plan_model(skeleton("gemma2"), Options(), "rotate")
    assert {v.code for v in plan.kept} >= {"post-norm"}
    assert any("written into it, and takes a number but no rotation (post-norm)" in v.reason for v in plan.kept)


def saved(tmp_path: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    model = built(name).to(dtype)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["fold", "rotate"])
@pytest.mark.parametrize("name", some(["llama tied", "gemma", "gpt2", "opt", "vit"], {"llama tied"}))
def test_the_output_loads_in_the_librarys_own_class(tmp_path: Path, name: str, method: str) -> None:
    source = saved(tmp_path, name)
    report = normconvert.convert(source, tmp_path / "out", method, verify_level="quick")
    assert report.fidelity is not None
    assert report.fidelity.passed
    auto = AutoModelForImageClassification if name == "vit" else AutoModelForCausalLM
    before = auto.from_pretrained(source, dtype=torch.float64)
    after, missing = auto.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert type(after) is type(before)
    assert not missing["missing_keys"]
    assert not missing["unexpected_keys"]
    expected, result = logits(before), logits(after)
    assert float((result - expected).norm() / expected.norm()) < 1e-5  # of weights rounded to float32
    own = normconvert.load(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(logits(own), result)
    modules = dict(after.named_modules())
    for verdict in report.plan.converted:
        gain = modules[verdict.path].weight + (1.0 if name == "gemma" else 0.0)
        assert bool((gain == 1).all())
    if name != "vit":
        head, table = after.get_output_embeddings().weight, after.get_input_embeddings().weight
        assert head is not table
        assert not torch.equal(head, table)
        assert after.config.tie_word_embeddings is False


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_a_stored_half_passes_the_verdict(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    report = normconvert.convert(saved(tmp_path, "llama", dtype), tmp_path / "out", method)
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert report.fidelity.storage is not None
    assert report.fidelity.storage <= 0.51


def test_doors_in_another_basis_are_named_and_not_held_to_be_the_same(tmp_path: Path) -> None:
    report = normconvert.convert(saved(tmp_path, "llama"), tmp_path / "out", "rotate", verify_level="quick")
    assert "inputs_embeds" in report.plan.untraced_doors
    assert "inputs_embeds" not in report.plan.doors
    assert {row["door"] for row in report.plan.shifted_doors} == {"hidden_states"}
    assert report.fidelity is not None
    assert report.fidelity.moved["hidden_states"] > 0.1
    assert any("inputs_embeds must be in the new basis" in note for note in report.notes)
    # Which is how it may be used: the output's own embeddings are in it.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)


def test_folding_names_the_hidden_states_behind_the_last_norm() -> None:
    plan = plan_model(skeleton("llama"), Options(), "fold")
    assert plan.shifted_doors == [{"door": "hidden_states", "output": "model.norm"}]
    assert "inputs_embeds" in plan.doors


def test_what_is_kept_does_not_change() -> None:
    tied = plan_model(skeleton("llama tied"), Options(keep="lm_head"), "fold")
    assert [v.path for v in tied.kept] == ["model.norm"]
    assert not tied.config
    plan = plan_model(skeleton("llama"), Options(keep="model.layers.0.*, lm_head.weight"), "fold")
    kept = {v.path for v in plan.kept}
    assert kept == {"model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"}
    assert not any(name.startswith(("model.layers.0.", "lm_head")) for name in plan.tensors)


def test_a_name_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"--keep model\.layer\.0: the model has no tensor and no module of that name"):
        plan_model(skeleton("llama"), Options(keep="lm_head, model.layer.0"), "fold")


@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_the_line_for_the_library_alone_is_printed_and_loads(tmp_path: Path, method: str) -> None:
    report = normconvert.convert("demo:gpt2", tmp_path / "out", method, verify=False)
    line = how_to_load(report)[-1]
    assert line == f'model = AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")  # the library alone'
    found: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM}
    exec(line, found)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = open_source("demo:gpt2").load()(ids).logits
        assert (found["model"](ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_another_seed_and_another_kind_are_other_tensors_of_the_same_function() -> None:
    truth = built("llama").double()
    expected, tables = logits(truth), []
    for options in (Options(), Options(seed=1), Options(rotation="random")):
        edited = algebra_model(truth, plan_model(skeleton("llama"), options, "rotate"))
        torch.testing.assert_close(logits(edited), expected, rtol=1e-11, atol=1e-11)
        tables.append(edited.get_input_embeddings().weight)  # type: ignore[operator]
    assert not torch.allclose(tables[0], tables[1])
    assert not torch.allclose(tables[0], tables[2])


def test_an_edit_that_the_graph_does_not_ask_for_is_found() -> None:
    options = Options()
    plan, graph = planned(skeleton("llama"), options, "rotate")
    plan.tensors["lm_head.weight"] = plan.tensors["lm_head.weight"][:1]
    assert "`lm_head.weight` is edited otherwise" in difference(graph, plan, options)


class Watched(nn.Module):
    """Something reads what the norm gives, without its mean, beside a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = self.norm(self.write(x))
        return self.read(n), (n - n.mean(-1, keepdim=True)).abs()


def test_what_reads_a_norms_result_without_its_mean_reads_it() -> None:
    graph = trace(Watched().to("meta").eval(), {"x": torch.zeros(2, 5, device="meta")})
    for method in ("fold", "rotate"):
        plan: Plan = REWRITES[method].planner(graph, Options())
        assert not plan.converted
    plan = REWRITES["rmsnorm"].planner(graph, Options(fold=True))
    assert plan.converted
    assert any("keeps its weight and bias" in note for note in plan.notes)


def test_a_model_without_such_norms_is_told_so() -> None:
    with pytest.raises(NothingToConvert, match="no LayerNorm or RMSNorm"):
        normconvert.convert("demo:convnet", "unused", "rotate", dry_run=True)


class Apart(nn.Module):
    """The tied table writes into a stream that stays, and its other side reads one that is rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.first, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)
        self.write, self.last = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + torch.nn.functional.gelu(self.inner(self.first(x)))
        return self.head(self.last(self.write(self.first(x))))


@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_a_head_is_untied_where_its_table_stays_as_it_is(method: str) -> None:
    ids = torch.arange(6).reshape(2, 3)
    outcome = check_basis(Apart, [{"ids": ids}], method, Options())
    assert outcome.plan is not None
    assert not outcome.problems
    assert "last" in [v.path for v in outcome.plan.converted]


class Twice(Apart):
    """The tied head reads two norms, of which no weight may move into it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = x + self.write(self.first(x))
        return torch.cat([self.head(self.other(x)), self.head(self.last(y))])


@pytest.mark.parametrize("method", ["fold", "rotate", "crmsnorm"])
def test_a_tied_head_that_reads_two_norms_takes_the_weight_of_none(method: str) -> None:
    ids = torch.arange(6).reshape(2, 3)
    outcome = check_basis(Twice, [{"ids": ids}], method, Options())
    assert outcome.plan is not None
    assert not [problem for problem in outcome.problems if "off by" in problem]


class Constant(nn.Module):
    """Values of parameters alone: one stream of them stays, and reads what writes into the other."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(3, 8))
        self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.write, self.read, self.head = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gated = torch.nn.functional.gelu(self.write(self.first(self.queries)))
        return self.read(self.first(self.queries)) + self.head(self.last(self.queries + gated)) + x


def test_a_norm_of_a_stream_that_stays_sees_a_rotation() -> None:
    outcome = check_basis(Constant, [{"x": torch.randn(3, 3, dtype=torch.float64)}], "rotate", Options())
    assert outcome.plan is not None
    assert not outcome.problems


class ReadInPlace(nn.Module):
    """A value of parameters alone is added to a stream, and read by a norm that is no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.gain = nn.Parameter(torch.empty(3, 8)), nn.Parameter(torch.empty(8))
        self.write, self.last = nn.Linear(5, 8), nn.LayerNorm(8)
        self.read, self.head = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.nn.functional.layer_norm(self.queries, (8,), self.gain)
        return self.head(self.last(self.write(x) + self.queries)) + self.read(seen)


@pytest.mark.parametrize("method", BASES)
def test_a_norm_inside_the_models_own_code_keeps_what_it_reads(method: str) -> None:
    outcome = check_basis(ReadInPlace, [{"x": torch.randn(3, 5, dtype=torch.float64)}], method, Options())
    assert outcome.plan is not None
    assert not outcome.problems
    assert not outcome.plan.converted


class ScaledOnce(nn.Module):
    """A layer scale of a value of parameters, of which a norm reads one without the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.gain = nn.Parameter(torch.empty(3, 8)), nn.Parameter(torch.empty(8))
        self.write, self.first, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.read, self.head = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.gain * (self.write(x) + self.queries)
        return self.head(self.last(stream)) + self.read(self.first(self.queries))


def test_a_layer_scale_does_not_fold_into_what_a_norm_reads_too() -> None:
    inputs = [{"x": torch.randn(3, 5, dtype=torch.float64)}]
    for method in BASES:
        assert not check_basis(ScaledOnce, inputs, method, Options(power="2")).problems
    assert not check(ScaledOnce, inputs).problems


class Experts(nn.Module):
    """A mixture in which every expert sees every token, and one tensor each way holds all of them."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen, self.write, self.norm, self.last = seen, nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
        self.router, self.head = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.write(x)
        n = self.norm(stream)
        given = torch.bmm(torch.bmm(n.expand(3, -1, -1), self.up).relu(), self.down)
        stream = stream + (given * self.router(n).softmax(-1).T.unsqueeze(-1)).sum(0)
        result: Tensor = self.head(self.last(stream))
        return result + self.up.sum() if self.seen else result


@pytest.mark.parametrize(("method", "seen"), [("fold", False), ("rotate", False), ("scale", False), ("rotate", True)])
def test_experts_in_one_tensor_take_what_their_norm_and_stream_ask_for(method: str, seen: bool) -> None:
    inputs = [{"x": torch.randn(7, 5, dtype=torch.float64)}]
    outcome = check_basis(lambda: Experts(seen), inputs, method, Options(seed=3, power="2"))
    assert outcome.plan is not None
    assert not outcome.problems
    assert len(outcome.plan.converted) == (0 if seen else 2), [v.reason for v in outcome.plan.kept]


@pytest.mark.parametrize("keep", [False, True])
def test_what_only_the_base_returns_is_a_way_out_and_listed(keep: bool) -> None:
    """Dinov2's mask token is reached by a call of its base alone, which returns what the last norm gives."""
    with torch.device("meta"):
        model = Dinov2ForImageClassification(Dinov2Config(**IMAGE)).eval()
    plan = plan_model(model, Options(keep_features=keep), "rotate")
    assert len(plan.converted) == (0 if keep else 5)
    doors = [row["door"] for row in plan.shifted_doors if row["door"] != "hidden_states"]
    assert sorted(doors) == ([] if keep else ["dinov2.last_hidden_state", "dinov2.pooler_output"])


class Chosen(nn.Module):
    """Tokens are taken by an index that is repeated along the channels, or by one that differs by channel."""

    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.differs = differs
        self.write, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        index = ids.repeat(1, 1, 4) if self.differs else ids[..., :1].repeat(1, 1, 8)
        result: Tensor = self.head(self.norm(torch.gather(self.write(x), 1, index)))
        return result


@pytest.mark.parametrize("method", ["rotate", "rmsnorm"])
@pytest.mark.parametrize("differs", [False, True])
def test_tokens_that_an_index_takes_whole_are_the_stream(method: str, differs: bool) -> None:
    inputs = [{"x": torch.randn(2, 6, 5, dtype=torch.float64), "ids": torch.randint(0, 6, (2, 4, 2))} for _ in range(2)]
    if method == "rotate":
        outcome = check_basis(lambda: Chosen(differs), inputs, method, Options())
    else:
        outcome = check(lambda: Chosen(differs), inputs)
    assert outcome.plan is not None
    assert not outcome.problems
    assert bool(outcome.plan.converted) is not differs
