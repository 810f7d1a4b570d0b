"""Soundness of ``crmsnorm`` by property: whatever the network, it computes the same in one channel less, or stays.

``NORMCONVERT_SOUNDNESS=5000 pytest tests/rewrites/test_crmsnorm_soundness.py -k random`` tries as many random networks.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.crmsnorm import plan_crmsnorm
from normconvert.runtime import CRMSNorm
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.equivalence import differences, on_meta, randomise
from tests.support.random_networks import Case, Network, describe, runnable_inputs

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "30"))


def problems(
    make: Callable[[], nn.Module], inputs: Sequence[Mapping[str, Tensor]], options: Options, seed: int = 0
) -> tuple[Plan | None, list[str]]:
    """The plan of a network (None if it could not be traced), and what is wrong with it."""
    with torch.device("meta"):
        skeleton = make().eval()
    try:
        graph = trace(skeleton, on_meta(inputs[0]))
    except TraceError:
        return None, []
    plan = plan_crmsnorm(graph, options)
    if not plan.converted:
        return plan, ["edits without a norm"] if plan.tensors or plan.modules else []
    truth = make().eval()
    randomise(truth, seed)
    # without the promise of mean-free inputs, on which a norm may run LayerNorm's kernel and hide a mistake
    converted = algebra_model(truth, plan)
    found = []
    for verdict in plan.converted:
        norm = converted.get_submodule(verdict.path)
        if type(norm) is not CRMSNorm:
            found.append(f"{verdict.path} is said to be converted but is a {type(norm).__name__}")
    return plan, found + differences(truth, converted, inputs)


def judge(case: Case) -> tuple[Plan | None, list[str]] | None:
    """The plan of a case and what is wrong; None if the network itself cannot run."""
    inputs = runnable_inputs(case)
    if inputs is None:
        return None
    torch.set_default_dtype(torch.float64)
    try:
        return problems(lambda: Network(case), inputs, case.options, case.seed)
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_networks_compute_the_same_in_one_channel_less() -> None:
    chance = random.Random(7 if "NORMCONVERT_SOUNDNESS" not in os.environ else None)
    counts: Counter[str] = Counter()
    for _ in range(MANY):
        case = describe(chance.choice)
        basis = chance.choice(("isometric", "paper"))
        case = replace(case, options=replace(case.options, basis=basis))
        outcome = judge(case)
        plan, wrong = outcome or (None, [])
        if plan is None:
            counts["cannot run"] += 1
            continue
        assert not wrong, f"{case}\n" + "\n".join(wrong)
        counts["converted" if plan.converted else "stays"] += 1
        counts["operations"] += sum(edit["op"] == "compress" for edit in plan.modules)
        counts["folded"] += sum(edit.get("expand") is False for edit in plan.modules)
        counts["all channels"] += sum(edit.get("expand") is True for edit in plan.modules)
    print(dict(counts))
    if MANY >= 60:
        assert min(counts[key] for key in ("converted", "stays", "operations", "folded", "all channels")) > 0, counts
