"""Soundness by property: whatever the network, a plan is right or there is none.

``NORMCONVERT_SOUNDNESS=5000 pytest tests/rewrites/test_soundness.py -k random`` tries as many random networks, others.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from torch import Tensor, nn

from normconvert.options import Options
from tests.support.equivalence import Outcome, check
from tests.support.network_norms import FEATURES, LEAKS, NORMS
from tests.support.network_ops import ACTIONS, DETOURS, PASSES
from tests.support.network_parts import SCALES, WRITERS
from tests.support.random_networks import (
    ALL_JOINS,
    HEADS,
    SOURCES,
    Case,
    Network,
    Step,
    cases,
    describe,
    inputs_for,
    runnable_inputs,
)

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "0"))


def judge(case: Case) -> Outcome | None:
    """The outcome of a case; None if the network itself cannot run."""
    inputs = runnable_inputs(case)
    return None if inputs is None else check(lambda: Network(case), inputs, case.options, seed=case.seed)


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


def judge_together(networks: Sequence[Case], gain: int) -> tuple[Outcome, dict[int, list[str]]]:
    """The outcome of all, and by number the norms of each that are converted."""
    torch.set_default_dtype(torch.float64)
    inputs: list[dict[str, Tensor]] = [{}, {}]
    for number, case in enumerate(networks):
        for one, data in zip(inputs, inputs_for(case, Network(case)), strict=False):
            one[f"data{number}"] = data["data"]
    outcome = check(lambda: Side(networks), inputs, Options(min_gain=gain), seed=1)
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
"""Where a row of each table stands in a network that would convert without it: the table, and the network of a row."""

MAY_STAY: dict[str, str] = {
    "source": "floats normed parameter patches_gelu sinusoids",
    "writer": """bias_elsewhere bilinear channel_mean clamped column_weight conv_depthwise conv_groups
        conv_max_pooled flipped fused_slice_shifted fused_slice_strided fused_split fused_uneven gained_weight
        gated gelu_last halves lerp max_over_tokens norm_output normalised plus_one product relu_in_place rolled
        rolled_flat scattered softmax token_conv token_mixer token_mixer_left upscaled used_inside""",
    "scale": """addcmul gamma_after_one gamma_divides gamma_flipped gamma_heads gamma_masks gamma_plus_one
        gamma_residual gamma_scaled gamma_square gamma_tanh gamma_twice gamma_two""",
    "join": "by_channel channel iadd_token index_add maximum product residual_product set_token",
    "norm": """batch_norm centred_half group_norm group_norm_each none over_both over_half over_tokens
        over_tokens_by_hand rms_by_hand rms_by_hand_bias rms_cast rms_divided rms_norm rms_of_another rms_of_tokens
        rms_plus_one rms_power rms_seen side_by_side std_outside unbiased sub_alpha tanh uncentred_variance""",
    "pass": """action_last_bias action_scalar_bias arange_added avg_pool_channels avg_pool_wide blur_channels
        buffer_added buffer_scale buffer_token channel_gate depthwise detour_all_flat detour_doubled
        detour_doubled_outer detour_doubled_wrong detour_flat detour_flat_channels detour_heads
        detour_merged_rows detour_split_channels detour_square detour_swapped_halves detour_wrong_view
        flip_channels full_added gather_channels lerp masked_channels masked_fill_one masked_scatter
        masked_square masked_value max_pool mixed_conv mixed_linear_bias mutated_by_module mutated_view
        one_minus ones_added pad_channels pad_value plus_one roll_flat scatter set_first sinusoids sorted
        squares take_along tril upsample_channels""",
    "detour": """all_flat doubled doubled_outer doubled_wrong flat flat_channels heads merged_rows split_channels
        square swapped_halves wrong_view""",
    "action": "last_bias scalar_bias",
    "leak": " ".join(LEAKS),
    "head": "nothing returned",
}
"""By kind, the rows with which the last norm may stay where no centring operation is inserted: most because no tensor
can take the mean out, a few because nobody has proved it. All others convert, and of the leaks none does.
"""

WRITES_IN_PLACE = re.compile("_$|^i?add_|in_place|mutated|^i?set_|^index_|channel$|relu_in")
"""Such rows stand in a network of their own: a trace is repeated for what is written in place."""


@pytest.mark.parametrize(
    "gain", [pytest.param(1, id="centring", marks=pytest.mark.slow), pytest.param(99, id="no-centring")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_part_is_converted_right(kind: str, gain: int) -> None:
    table, network = KINDS[kind]
    size = (2, 6, 8) if gain == 1 else (4, 4, 4)  # square: an axis taken for another is not noticed by its size
    kept: set[str] = set()
    in_place = {name for name in table if WRITES_IN_PLACE.search(name)}
    # Tensors of which nothing comes could be written into the streams of the others.
    alone = {"nothing"} & set(table)
    for names in filter(None, ([n for n in table if n not in in_place | alone], sorted(in_place), sorted(alone))):
        outcome, converted = judge_together([network(size, name) for name in names], gain)
        assert outcome.plan is not None, outcome.problems
        assert not outcome.problems, "\n".join(f"{names[_number(p)]}: {p}" for p in outcome.problems)
        kept |= {name for number, name in enumerate(names) if "norm" not in converted[number]}
    may_stay = set(MAY_STAY.get(kind, "").split())
    if gain == 99:
        assert kept <= may_stay
    if kind == "leak":
        assert kept == may_stay


def _number(problem: str) -> int:
    """The number of the network that a problem is about."""
    found = re.search(r"networks\.(\d+)\.|(\d+):", problem.partition(": ")[2] or problem)
    assert found is not None
    return int(found[1] or found[2])


def test_random_networks_are_converted_right_or_not_at_all() -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=MANY or 25,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases())
    def judged(case: Case) -> None:
        outcome = judge(case)
        assume(outcome is not None)
        assert outcome is not None
        result = "not traced" if outcome.plan is None else "converted" if outcome.plan.converted else "refused"
        counts[result] += 1
        event(result)
        assert outcome.plan is None or not outcome.problems, "\n".join(outcome.problems)

    judged()
    print(dict(counts))
    # a property that holds because everything is refused would say nothing
    assert counts["converted"] >= 0.3 * counts.total()
    assert counts["not traced"] <= max(1, 0.02 * counts.total())


@pytest.mark.slow
def test_random_networks_drawn_without_hypothesis() -> None:
    """Plain draws repeat themselves less than hypothesis's do: the better hunt, without shrinking."""
    draw = random.Random(MANY or 1)
    for _ in range(MANY or 30):
        case = describe(draw.choice)
        outcome = judge(case)
        assert outcome is None or outcome.plan is None or not outcome.problems, f"{case}\n" + "\n".join(
            outcome.problems
        )
