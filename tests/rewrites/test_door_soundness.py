"""Soundness through every door: whatever the network and whatever ways in and out it has, each is right, or listed.

``NORMCONVERT_SOUNDNESS=2000 pytest -m slow tests/rewrites/test_door_soundness.py`` tries as many random networks.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.doors import with_doors
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.equivalence import TOLERANCE, distance, randomise
from tests.support.random_networks import VOCAB, Case, Network, Step, describe

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "0"))
SOURCES = ("embedding", "learned_positions", "scaled", "gained", "position_table")
"""Of token ids, by a table ``e``."""


@dataclass(frozen=True)
class Doors:
    """What a network can be called with or for, beside its token ids.

    Attributes:
        joins: where embeddings from outside stand: for the ``table``'s output, or for the whole of the ``source``'s.
        loss: what labels are compared with: the ``logits``, or the ``stream`` itself.
        flag: what a flag returns beside the rest: nothing, the ``stream``, or the ``normed`` stream.
        method: what a method of features returns: the ``stream``, the ``normed`` stream, or there is none.
    """

    joins: str = "source"
    loss: str = "logits"
    flag: str = ""
    method: str = ""


class Entered(Network):
    """A random network with doors, as users of transformers know them."""

    main_input_name = "input_ids"

    def __init__(self, case: Case, doors: Doors) -> None:
        super().__init__(case)
        self.doors = doors
        self.last = nn.LayerNorm(case.width)
        self.read = nn.Linear(case.width, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.source.get_submodule("e")

    def _entered(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        source: Any = self.source
        if inputs_embeds is None:
            found: Tensor = source(input_ids)
        elif self.doors.joins == "source":
            found = inputs_embeds
        else:
            table, source.e = source.e, nn.Identity()
            try:
                found = source.function(source, inputs_embeds)
            finally:
                source.e = table
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_stream: bool = False,
    ) -> dict[str, Tensor]:
        entered = self._entered(input_ids, inputs_embeds)
        x, outputs = self.stream(entered, entered if input_ids is None else input_ids)
        outputs |= self._head(x)
        if labels is not None:
            seen = x if self.doors.loss == "stream" else self.read(self.last(x))
            outputs["loss"] = (seen * labels[..., None].to(x.dtype)).square().mean()
        if return_stream and self.doors.flag:
            outputs["more"] = x if self.doors.flag == "stream" else self.last(x)
        return {"last": self.read(self.last(x)), **outputs}

    def _features(self: Any, input_ids: Tensor) -> Tensor:
        x, _ = self.stream(self.source(input_ids), input_ids)
        found: Tensor = x if self.doors.method == "stream" else self.last(x)
        return found


def with_method(case: Case, doors: Doors) -> Entered:
    """The network; ``get_*_features`` are looked for in the class, as models have them."""
    kind = type("Entered", (Entered,), {"get_stream_features": Entered._features} if doors.method else {})
    network: Entered = kind(case, doors)
    return network


def calls(case: Case, network: Entered) -> list[dict[str, Any]]:
    """Calls through the doors, at the traced size and, where the network permits, another."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    sizes = [(case.batch, case.tokens)]
    if not network.size.exact and case.tokens > 1:
        sizes.append((case.batch + 1, case.tokens if network.size.fixed else case.tokens + 2))
    made: list[dict[str, Any]] = []
    for size in sizes:
        ids = torch.randint(0, VOCAB, size, generator=generator)
        embeds = torch.randn((*size, case.width), generator=generator, dtype=torch.float64) + 0.7
        labels = torch.ones((size[0], network.size.tokens if size == sizes[0] else 1), dtype=torch.int64)
        for entered in ({"input_ids": ids}, {"inputs_embeds": embeds}):
            made += [entered, {**entered, "labels": labels}, {**entered, "return_stream": True}]
    return made


def problems(case: Case, doors: Doors, method: str) -> tuple[Plan, list[str]] | None:
    """The plan, and what is wrong with it; None if the network cannot run or be traced."""
    torch.set_default_dtype(torch.float64)
    try:
        truth = with_method(case, doors).eval()
        randomise(truth, case.seed)
        made = calls(case, truth)
        expected = [_result(truth, call) for call in made]
        with torch.device("meta"):
            skeleton = with_method(case, doors).eval()
        plan = plan_model(skeleton, case.options, method, lambda model: _traced(model, made[0]))
        converted = algebra_model(truth, plan)
        wrong = [
            f"{' and '.join(call)}: {name} is off by {error:.2g}"
            for call, values in zip(made, expected, strict=True)
            # A door that could not be traced is named as not proved.
            if call.keys().isdisjoint(plan.untraced_doors)
            for name, error in _errors(_result(converted, call), values)
            if not error <= TOLERANCE
        ]
        if doors.method:
            pair = [Entered._features(model, made[0]["input_ids"]).detach() for model in (truth, converted)]
            moved = distance(pair[1], pair[0]) > TOLERANCE
            if moved and "get_stream_features" not in {row["door"] for row in plan.shifted_doors}:
                wrong.append("the method returns something else, and is not listed")
        return plan, wrong
    except (TraceError, RuntimeError, IndexError, ValueError, AssertionError):
        return None
    finally:
        torch.set_default_dtype(torch.float32)


def _traced(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return with_doors(model, trace(model, inputs), inputs)


def _result(model: nn.Module, call: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dict(model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}))


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[tuple[str, float]]:
    return [(name, distance(found[name], value)) for name, value in expected.items()]


def drawn(pick: Callable[[Sequence[Any]], Any]) -> tuple[Case, Doors, str]:
    """A random network that token ids enter, its doors, and a conversion."""
    case = describe(pick)
    method = pick(("rmsnorm", "rmsnorm", "crmsnorm", "fold", "rotate", "scale"))
    if method == "rotate" and pick((True, False)):  # hardly a network of all parts can be rotated
        steps = tuple(Step("block", pick(("linear", "mlp"))) for _ in range(pick((1, 2, 3))))
        case = replace(case, steps=steps, head=pick(("linear", "tied", "pooled", "first")))
    basis = {"power": pick(("3", "-2"))} if method == "scale" else {"values": pick((False, True))}
    options = replace(case.options, allow_shifted_outputs=False, keep_features=pick((False, False, True)), **basis)
    doors = Doors(
        joins=pick(("source", "table")),
        loss=pick(("logits", "stream")),
        flag=pick(("", "stream", "normed")),
        method=pick(("", "stream", "normed")),
    )
    return replace(case, source=pick(SOURCES), options=options), doors, method


@settings(max_examples=MANY or 5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
          phases=(Phase.explicit, Phase.generate, Phase.shrink))  # fmt: skip
@given(st.data())
def test_a_plan_is_right_through_every_door(data: st.DataObject) -> None:
    case, doors, method = drawn(lambda choices: data.draw(st.sampled_from(choices)))
    outcome = problems(case, doors, method)
    assume(outcome is not None)
    assert outcome is not None
    assert not outcome[1], (outcome[1], doors, method)


@pytest.mark.slow
def test_random_networks_with_doors() -> None:
    counts: Counter[str] = Counter()
    many = MANY or 60
    for seed in range(many):
        generator = random.Random(seed)
        case, doors, method = drawn(generator.choice)
        outcome = problems(case, doors, method)
        counts["not run" if outcome is None else method] += 1
        if outcome is not None:
            counts[f"norms, {method}"] += len(outcome[0].converted)
            assert not outcome[1], (seed, outcome[1], doors, method, case)
    print(dict(counts))
    assert counts["not run"] < many / 2


TWO = (Step("block", "linear"), Step("block", "mlp"))
CASES = {
    "plain": (Doors(), True),
    "table": (Doors(joins="table"), True),
    "loss on the stream": (Doors(loss="stream"), False),
    "a flag returns the stream": (Doors(flag="stream"), False),
    "a flag returns a normed stream": (Doors(flag="normed"), True),
    "a method returns the stream": (Doors(method="stream"), True),
}


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm", "rotate", pytest.param("scale", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_each_door_alone(name: str, method: str) -> None:
    """What a door reads of the stream itself keeps the norms; a method of features is listed instead, or kept."""
    doors, converts = CASES[name]
    # A rotated norm gives a rotated stream, and that is what the flag returns.
    converts = converts and not (doors.flag == "normed" and method == "rotate")
    case = Case(steps=TWO, source="learned_positions", tokens=5, options=Options(min_gain=1, power="3"))
    outcome = problems(case, doors, method)
    assert outcome is not None
    plan, wrong = outcome
    assert not wrong
    assert bool(plan.converted) == converts
    # Embeddings from outside know nothing of another basis: that door is named as not proved.
    entered = {"inputs_embeds"} if method in ("rotate", "scale") else set()
    assert {"inputs_embeds", "labels", "return_stream"} - entered <= set(plan.doors) or not converts
    assert entered <= set(plan.untraced_doors) or not converts
    if doors.method:
        assert "get_stream_features" in {row["door"] for row in plan.shifted_doors}
        kept = problems(replace(case, options=replace(case.options, keep_features=True)), doors, method)
        assert kept is not None
        assert not kept[1]
        assert not kept[0].converted


def test_what_a_method_makes_by_the_same_writers_is_listed() -> None:
    """Though the only norm that the method's call runs stays: it is not in a module of its own."""
    block = Step("block", "fused_view_inner", norm="batch_moved", scale="divided")
    case = Case(steps=(block,), source="gained", head="norm", tokens=6, options=Options(min_gain=1), seed=1)
    outcome = problems(case, Doors(joins="table", flag="normed", method="stream"), "rmsnorm")
    assert outcome is not None
    plan, wrong = outcome
    assert plan.converted
    assert not wrong


def test_what_a_method_makes_behind_a_centring_operation_is_listed() -> None:
    """Though no norm that the method's call runs is converted; embeddings from outside keep the first one."""
    block = Step("block", "linear", scale="gamma_plus_one")
    options = Options(tied="untie", min_gain=3)
    case = Case("learned_positions", (block,), head="nothing", tokens=5, width=8, options=options, seed=2)
    outcome = problems(case, Doors(joins="table", flag="normed", method="stream"), "rmsnorm")
    assert outcome is not None
    plan, wrong = outcome
    assert [edit["op"] for edit in plan.modules] == ["center", "replace"]
    assert "get_stream_features" in {row["door"] for row in plan.shifted_doors}
    assert not wrong


def test_a_norm_that_a_method_returns_is_not_folded_though_it_is_of_parameters_alone() -> None:
    """Learned queries that read nothing of the texts."""
    steps = Step("second", "queries"), Step("block", "linear")
    options = Options(min_gain=1, fold=True, keep_features=True)
    case = Case("gained", steps, head="returned", tokens=5, options=options)
    outcome = problems(case, Doors(joins="table", method="normed"), "rmsnorm")
    assert outcome is not None
    plan, wrong = outcome
    assert "last" in {verdict.path for verdict in plan.converted}
    assert "last.weight" not in plan.tensors
    assert not wrong
