"""A converted model is the original however it is entered: by token ids, by embeddings, with another table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert import convert, load
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.runtime import Center
from normconvert.tracing.output_paths import tensors_in
from normconvert.verification.algebra import algebra_model
from normconvert.verification.equivalence import tolerance_for
from tests.support.zoo_cases import NamedCase, named_cases

CASES = named_cases()
TOLERANCE = 1e-10
WIDTH, VOCABULARY = 48, 101


def error(found: nn.Module, expected: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> float:
    """The largest relative error of an output."""
    outputs: list[dict[str, Tensor]] = []
    for model in (expected, found):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs.append(tensors_in(model(**{**inputs, "use_cache": False})))
    assert outputs[0].keys() == outputs[1].keys()
    return max(float((b - a).norm() / a.norm()) for a, b in zip(*(o.values() for o in outputs), strict=True))


def embeddings(batch: int, length: int, width: int = WIDTH) -> Tensor:
    """Values with a mean, as a trained table has it."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64) + 0.7


def ids(batch: int, length: int) -> Tensor:
    """Of ESM-2's vocabulary, which is the smallest."""
    return torch.randint(3, 33, (batch, length), generator=torch.Generator().manual_seed(length))


def mask(batch: int, length: int) -> Tensor:
    found = torch.ones(batch, length, dtype=torch.int64)
    found[0, -2:] = 0
    return found


def mel(batch: int) -> Tensor:
    return torch.randn(batch, 12, 32, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


Calls = Callable[[int, int], list[dict[str, Any]]]


def one_sided(b: int, n: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids(b, n)},
        {"inputs_embeds": embeddings(b, n)},
        {"inputs_embeds": embeddings(b, n), "attention_mask": mask(b, n)},
    ]


def two_sided(b: int, n: int) -> list[dict[str, Any]]:
    own = {"inputs_embeds": embeddings(b, n)}, {"decoder_inputs_embeds": embeddings(b, n - 1)}
    by_ids = {"input_ids": ids(b, n)}, {"decoder_input_ids": ids(b, n - 1)}
    return [{**a, **d} for a in (own[0], by_ids[0]) for d in (own[1], by_ids[1])]


def heard(b: int, n: int) -> list[dict[str, Any]]:
    decoders: list[dict[str, Any]] = [
        {"decoder_inputs_embeds": embeddings(b, n)},
        {"decoder_input_ids": ids(b, n)},
    ]
    return [{"input_features": mel(b), **d} for d in decoders]


ENTERED: dict[str, Calls] = {
    **dict.fromkeys(["gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "phi", "stablelm"], one_sided),
    **dict.fromkeys(["bert", "esm2", "roberta_prelayernorm", "megatron_bert", "biogpt", "olmo"], one_sided),
    **dict.fromkeys(["mbart", "m2m_100", "pegasus", "blenderbot"], two_sided),
    "whisper": heard,
}


WAYS: dict[str, dict[str, Any]] = {"default": {}, "untie": {"tied": "untie"}, "min-gain-1": {"min_gain": 1}}
EVERY_DAY = {
    *(("gpt2", way) for way in WAYS),
    *((name, "default") for name in ("gpt_neox", "bloom", "stablelm", "esm2", "bert", "mbart", "whisper")),
}
"""One of each way in; the tests of the others are slow ones."""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{way}", marks=[] if (name, way) in EVERY_DAY else pytest.mark.slow)
        for name in ENTERED
        for way, options in WAYS.items()
    ],
)
def test_embeddings_from_outside_are_as_good_as_token_ids(name: str, options: dict[str, Any]) -> None:
    case: NamedCase = CASES[name]
    plan = plan_model(case.skeleton(), Options(**options))
    assert plan.converted
    assert set(plan.untraced_doors) <= {"set_input_embeddings"}
    truth = case.build().double()
    converted = algebra_model(truth, plan)
    modules = dict(converted.named_modules())
    assert all(type(modules[v.path]).__name__ == "RMSNorm" for v in plan.converted)
    for batch, length in ((1, 3), (2, 9)):
        for inputs in ENTERED[name](batch, length):
            assert error(converted, truth, inputs) <= tolerance_for(plan), (sorted(inputs), plan.modules[:2])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mbart"])
def test_in_one_channel_less_embeddings_are_as_good_as_token_ids(name: str) -> None:
    case: NamedCase = CASES[name]
    plan = plan_model(case.skeleton(), method="crmsnorm")
    assert plan.converted
    truth = case.build().double()
    converted = algebra_model(truth, plan)
    for inputs in ENTERED[name](2, 9):
        assert error(converted, truth, inputs) <= TOLERANCE, (sorted(inputs), plan.modules[:2])


@pytest.mark.parametrize("options", [{}, {"tied": "untie"}], ids=["default", "untie"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "bloom"])
def test_another_table_may_be_put_in(name: str, options: dict[str, Any]) -> None:
    case: NamedCase = CASES[name]
    truth = case.build().double()
    plan = plan_model(case.skeleton(), Options(**options))
    converted = algebra_model(truth, plan)
    table = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    for model in (truth, converted):
        model.set_input_embeddings(copy.deepcopy(table))  # type: ignore[operator]
    # Bloom's first norm is the only one that reads its table, and an operation that wins one norm is none to insert.
    if "set_input_embeddings" in plan.untraced_doors:
        assert (name, options) == ("bloom", {"tied": "untie"})
        assert "not proved for set_input_embeddings" in plan.notes
    else:
        assert error(converted, truth, {"input_ids": ids(2, 9)}) <= TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_one_operation_serves_all_doors(name: str) -> None:
    plan: Plan = plan_model(CASES[name].skeleton())
    assert [edit["op"] for edit in plan.modules].count("center") == 1
    assert plan.doors == ["inputs_embeds", "labels", "use_cache"]
    assert not plan.tensors.keys() & {"transformer.wte.weight", "gpt_neox.embed_in.weight"}


def test_where_one_norm_is_won_an_operation_stands_on_what_comes_from_outside_alone() -> None:
    """Of BERT the first norm converts, by its tables; an operation in its way would cost more than it wins."""
    plan = plan_model(CASES["bert"].skeleton())
    (edit,) = [edit for edit in plan.modules if edit["op"] == "center"]
    assert (edit["key"], edit["optional"]) == ("inputs_embeds", True)


def test_an_optional_input_may_be_left_out_or_given_by_its_place() -> None:
    class Table(nn.Module):
        def forward(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Any:
            return ids, embeds

    table = Table()
    table.register_forward_pre_hook(Center("input", "embeds", -1, optional=True), with_kwargs=True)
    x = embeddings(1, 3)
    centred = x - x.mean(-1, keepdim=True)
    assert table(ids(1, 3))[1] is None
    assert table(ids=ids(1, 3), embeds=None)[1] is None
    assert torch.equal(table(None, x)[1], centred)
    assert torch.equal(table(embeds=x)[1], centred)


@pytest.mark.parametrize("options", [{}, {"tied": "untie"}], ids=["default", "untie"])
def test_the_written_folder_is_right_through_every_door(tmp_path: Path, options: dict[str, Any]) -> None:
    truth = CASES["gpt2"].build()
    truth.save_pretrained(tmp_path / "a")  # type: ignore[operator]
    truth = truth.double()
    report = convert(tmp_path / "a", tmp_path / "b", **options)
    assert report.fidelity is not None
    assert "embeds" in {row["probe"] for row in report.fidelity.probes}
    converted = load(tmp_path / "b", dtype=torch.float64)
    for inputs in one_sided(2, 9):
        assert error(converted, truth, inputs) <= 1e-6  # the edited weights are stored in float32


def test_a_wrong_door_fails_the_verification(tmp_path: Path) -> None:
    """With the tied table's output centred, as it was done once, embeddings from outside keep their mean."""
    from normconvert.tracing.probes import verification_inputs
    from tests.support.equivalence import compare_models

    case = CASES["gpt2"]
    plan = plan_model(case.skeleton())
    for edit in plan.modules:
        if edit["op"] == "center":
            edit |= {"path": "transformer.wte", "side": "output", "key": ""}
    plan.tensors["transformer.wpe.weight"] = [{"op": "center", "axis": 1}]
    truth = case.build().double()
    errors = compare_models(truth, algebra_model(truth, plan), verification_inputs(case.skeleton()))
    wrong = {probe for (probe, _), value in errors.items() if value > TOLERANCE}
    assert wrong == {"embeds"}


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_what_must_come_in_by_a_door_is_said_once(method: str) -> None:
    plan = plan_model(CASES["gpt_neox"].skeleton(), Options(power="2"), method)
    said = [note for note in plan.notes if "inputs_embeds" in note]
    assert plan.untraced_doors
    assert len(said) == 1, said
