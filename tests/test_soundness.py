"""Soundness by property: whatever the network, a plan is right or there is none.

``NORMCONVERT_SOUNDNESS=5000 pytest tests/test_soundness.py -k random`` runs as many random networks, new ones each time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings

from tests.equivalence import Outcome, check
from tests.network_norms import FEATURES, LEAKS, NORMS
from tests.network_ops import ACTIONS, DETOURS, PASSES
from tests.network_parts import IN_PLACE, JOINS, JOINS_OPAQUE, SCALES, WRITERS
from tests.random_networks import HEADS, SOURCES, VOCAB, Case, Network, Step, cases, inputs_for
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
