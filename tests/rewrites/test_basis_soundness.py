"""Soundness of `fold`, `rotate` and `scale` by property: whatever the network, a plan is right or there is none.

``NORMCONVERT_SOUNDNESS=5000 pytest tests/rewrites/test_basis_soundness.py`` tries as many random networks, others.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch

from normconvert.options import Options
from tests.rewrites.test_soundness import KINDS, WRITES_IN_PLACE, Side
from tests.support.basis import check_basis
from tests.support.random_networks import Network, describe, inputs_for, runnable_inputs

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "0"))
METHODS = ["fold", "rotate", "scale"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_part_is_converted_right(kind: str, method: str) -> None:
    table, network = KINDS[kind]
    for in_place in (False, True):
        # Tensors of which nothing comes could be written into the streams of the others.
        names = [n for n in table if bool(WRITES_IN_PLACE.search(n)) == in_place and n != "nothing"]
        cases = [network((4, 4, 4), n) for n in names]
        torch.set_default_dtype(torch.float64)
        inputs: list[dict[str, torch.Tensor]] = [{}, {}]
        for number, case in enumerate(cases):
            for one, data in zip(inputs, inputs_for(case, Network(case)), strict=False):
                one[f"data{number}"] = data["data"]
        torch.set_default_dtype(torch.float32)
        if cases:
            options = Options(seed=1, power="3", values=True)
            outcome = check_basis(lambda cases=cases: Side(cases), inputs, method, options, seed=1)  # type: ignore[misc]
            assert outcome.plan is not None, outcome.problems
            assert not outcome.problems, "\n".join(outcome.problems)


@pytest.mark.parametrize("method", METHODS)
def test_random_networks_are_converted_right_or_not_at_all(method: str) -> None:
    draw = random.Random(MANY or 7)
    counts: Counter[str] = Counter()
    for number in range(MANY or 6):
        case = describe(draw.choice)
        inputs = runnable_inputs(case)
        if inputs is None:
            continue
        options = Options(
            seed=number, rotation=draw.choice(["hadamard", "random"]), power=draw.choice(["2", "-5"]),
            values=draw.random() < 0.7,
        )  # fmt: skip
        outcome = check_basis(lambda case=case: Network(case), inputs, method, options, seed=case.seed)  # type: ignore[misc]
        counts["converted" if outcome.plan and outcome.plan.converted else "refused"] += 1
        assert outcome.plan is None or not outcome.problems, f"{case}\n" + "\n".join(outcome.problems)
    print(dict(counts))
    # A property that holds because everything is refused would say nothing.
    # (Of a few networks there may be few; of many about one in eleven is rotated.)
    assert counts["converted"] >= (0.05 * counts.total() if MANY else 1)
