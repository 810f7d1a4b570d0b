"""Soundness by property: whatever the network, a plan is right or there is none.

``NORMCONVERT_SOUNDNESS=5000 pytest tests/test_soundness.py -k random`` runs as many random networks, new ones each time.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from torch import Tensor, nn

from tests.equivalence import Outcome, check
from tests.network_norms import FEATURES, LEAKS, NORMS
from tests.network_ops import ACTIONS, DETOURS, PASSES
from tests.network_parts import SCALES, WRITERS
from tests.random_networks import ALL_JOINS, HEADS, SOURCES, Case, Network, Step, cases, inputs_for
from normconvert.rewrites.rmsnorm import Options

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "0"))
COUNTS: Counter[str] = Counter()


def judge(case: Case) -> Outcome | None:
    """The outcome of a case; None if the network itself cannot run (an in-place write into expanded memory, say)."""
    torch.set_default_dtype(torch.float64)
    try:
        network = Network(case).eval()
        inputs = inputs_for(case, network)
        with torch.no_grad():
            network(**{name: value.clone() for name, value in inputs[0].items()})
            try:
                network(**{name: value.clone() for name, value in inputs[2].items()})
            except RuntimeError:
                inputs = inputs[:2]  # traced for this shape only
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return None
    finally:
        torch.set_default_dtype(torch.float32)
    return check(lambda: Network(case), inputs, case.options, seed=case.seed)


class Side(nn.Module):
    """Many small networks side by side in one, each with an input and outputs of its own: one trace judges them all."""

    def __init__(self, networks: Sequence[Case]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(Network(case) for case in networks)

    def forward(self, **data: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for number, network in enumerate(self.networks):
            found = network(data[f"data{number}"])
            outputs |= {f"{number}:{name}": value for name, value in found.items()}
        return outputs


def judge_together(networks: Sequence[Case]) -> tuple[Outcome, dict[int, list[str]]]:
    """The outcome of all, and by number the norms of each that are converted."""
    torch.set_default_dtype(torch.float64)
    inputs: list[dict[str, Tensor]] = [{}, {}]
    for number, case in enumerate(networks):
        for one, data in zip(inputs, inputs_for(case, Network(case)), strict=False):
            one[f"data{number}"] = data["data"]
    outcome = check(lambda: Side(networks), inputs, Options(min_gain=1), seed=1)
    found: dict[int, list[str]] = {number: [] for number in range(len(networks))}
    for verdict in outcome.plan.converted if outcome.plan else ():
        _, number_text, path = verdict.path.split(".", 2)
        found[int(number_text)].append(path)
    return outcome, found


def _case(size: tuple[int, int, int], *steps: Step, **fields: Any) -> Case:
    batch, tokens, width = size
    return Case(steps=steps, batch=batch, tokens=tokens, width=width, **fields)


KINDS: dict[str, tuple[Iterable[str], Callable[[Any, str], Case]]] = {
    "source": (SOURCES, lambda s, row: _case(s, source=row)),
    "writer": (WRITERS, lambda s, row: _case(s, Step("block", row))),
    "scale": (SCALES, lambda s, row: _case(s, Step("block", "linear", scale=row))),
    "join": (ALL_JOINS, lambda s, row: _case(s, Step("block", "linear", join=row))),
    "norm": (NORMS, lambda s, row: _case(s, Step("block", "linear", norm=row))),
    "pass": (PASSES, lambda s, row: _case(s, Step("pass", row))),
    "detour": (DETOURS, lambda s, row: _case(s, Step("detour", row, action="bias"))),
    "action": (ACTIONS, lambda s, row: _case(s, Step("detour", "image", action=row))),
    "feature": (FEATURES, lambda s, row: _case(s, Step("feature", row))),
    "leak": (LEAKS, lambda s, row: _case(s, Step("leak", row))),
    "head": (HEADS, lambda s, row: _case(s, head=row)),
}
"""Where a row of each table stands in a network that would convert without it: a table, and the network around a row."""

KEPT: dict[str, frozenset[str]] = {}


@pytest.mark.parametrize("size", [(2, 3, 4), (4, 4, 4), (2, 6, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_part_is_converted_right(kind: str, size: tuple[int, int, int]) -> None:
    table, network = KINDS[kind]
    names = list(table)
    outcome, converted = judge_together([network(size, name) for name in names])
    assert outcome.plan is not None, outcome.problems
    assert not outcome.problems, "\n".join(names[int(re.findall(r"\d+", p)[1])] + ": " + p for p in outcome.problems)
    if size == (2, 6, 8):
        kept = {name for number, name in enumerate(names) if "norm" not in converted[number]}
        assert kept == KEPT.get(kind), f"{kept ^ KEPT.get(kind, frozenset())}"


@settings(
    max_examples=MANY or 200,
    derandomize=not MANY,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=bool(MANY),
    phases=[Phase.generate, Phase.shrink],
)
@given(cases())
def test_random_networks_are_converted_right_or_not_at_all(case: Case) -> None:
    outcome = judge(case)
    COUNTS["invalid"] += outcome is None
    assume(outcome is not None)
    assert outcome is not None
    COUNTS["cases"] += 1
    if outcome.plan is None:
        COUNTS["not traced"] += 1
        event("not traced")
        return
    converted = bool(outcome.plan.converted)
    COUNTS["converted" if converted else "refused"] += 1
    event("converted" if converted else "refused")
    if converted:
        for step in case.steps:
            COUNTS[f"{step.kind} {step.name}"] += 1
    assert not outcome.problems, "\n".join(outcome.problems)
