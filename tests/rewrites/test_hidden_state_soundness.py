"""Hidden states by property: what a layer gives is as it was, or in the new basis, and never anything else.

``NORMCONVERT_SOUNDNESS=5000 pytest tests/rewrites/test_hidden_state_soundness.py`` tries as many random networks.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_graph
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.equivalence import Inputs, distance, on_meta, randomise
from tests.support.random_networks import Case, Network, describe, runnable_inputs

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "0"))
METHODS = ["rmsnorm", "fold", "rotate", "scale"]
LIMIT = 1e-9


class Layered(Network):
    """A network whose steps are layers with hidden states, of which the head reads one, and perhaps not the last."""

    main_input_name = "data"

    def __init__(self, case: Case, read: int) -> None:
        super().__init__(case)
        self.read = read

    def forward(self, data: Tensor) -> dict[str, Tensor]:
        x, outputs = self.stream(self.source(data), data, 0, self.read)
        self.stream(x, data, self.read)
        return outputs | self._head(x)


def states(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The outputs, and what each layer gives, call by call."""
    given: dict[str, list[Tensor]] = defaultdict(list)

    def keep(path: str) -> Any:
        # A copy: what comes behind it may write into it.
        return lambda _, __, value: given[path].append(value.clone())

    layers: Any = model.steps
    handles = [layer.register_forward_hook(keep(f"steps.{name}")) for name, layer in layers.named_children()]
    with torch.no_grad():
        outputs = model(**{name: value.clone() for name, value in inputs.items()})
    for handle in handles:
        handle.remove()
    return outputs, given


def of_the_new_basis(method: str, before: Tensor, after: Tensor) -> bool:
    """Whether a value is what ``method`` makes of another: the same but for its mean, as long, or times a number."""
    free = [
        (x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True))
        for x, y in [(before, after)]
        for dim in range(x.ndim)
    ]
    if method == "rmsnorm":
        return any(distance(y, x) <= LIMIT for x, y in free)
    if method == "rotate":  # what a LayerNorm behind a table gives loses its mean as well
        return any(abs(float(y.norm() / x.norm()) - 1) <= LIMIT for x, y in [(before, after), *free])
    return distance(after / (after.norm() / before.norm()), before) <= LIMIT


def wrong(plan: Plan, method: str, case: Case, truth: nn.Module, edited: nn.Module, inputs: Inputs) -> list[str]:
    """The outputs and layers that give what they should not."""
    (expected, before), (found, after) = states(truth, inputs), states(edited, inputs)
    problems = [name for name, value in expected.items() if not distance(found[name], value) <= LIMIT]
    listed = {row["output"] for row in plan.shifted_doors}
    # What is written to in place is named as not proved: of that the plan says nothing.
    if "hidden_states" in plan.untraced_doors:
        return problems
    # What a norm gives has lost its weight as well: of these it is enough that they are listed.
    plain = {f"steps.{n}" for n, step in enumerate(case.steps) if step.kind in ("block", "again") and not step.post}
    # A module that is called by two names is listed by one of them.
    for path, values in before.items():
        same = all(distance(b, a) <= LIMIT for a, b in zip(values, after[path], strict=True))
        if path in plain and not same and not (listed and all(
            distance(b, a) <= LIMIT or of_the_new_basis(method, a, b) for a, b in zip(values, after[path], strict=True)
        )):  # fmt: skip
            problems.append(path)
    return problems


def planned(case: Case, read: int, method: str, inputs: Inputs, options: Options) -> tuple[Plan, nn.Module]:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            skeleton = Layered(case, read).eval()
        plan = plan_graph(trace(skeleton, on_meta(inputs)), options, method)
        truth = Layered(case, read).eval()
        randomise(truth, case.seed)
        return plan, truth
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_of_random_networks_are_of_one_basis(method: str) -> None:
    draw = random.Random(MANY or 2)
    counts: Counter[str] = Counter()
    for number in range(MANY or 10):
        case = replace(describe(draw.choice), head=draw.choice(["linear", "norm", "pooled", "tied"]))
        if case.source in ("parameter", "queries"):
            continue  # no layer of any model is the same whatever it is given
        inputs = runnable_inputs(case)
        read = draw.choice([*range(1, len(case.steps) + 1)] or [0])
        if inputs is None:
            continue
        options = Options(seed=number, power=draw.choice(["2", "-5"]))
        try:
            plan, truth = planned(case, read, method, inputs[0], options)
        except (RuntimeError, IndexError, ValueError, AssertionError):  # the network itself cannot be cut there
            counts["not run"] += 1
            continue
        counts["converted" if plan.converted else "refused"] += 1
        if plan.converted:
            assert not (found := wrong(plan, method, case, truth, algebra_model(truth, plan), inputs[1])), (
                f"{case} {read} {found}"
            )
    print(dict(counts))
    assert counts["converted"] >= (0.05 * counts.total() if MANY else 1)
