"""Soundness of fuse-bn by property: whatever the network, each norm is kept, or gone without a trace in the outputs.

``NORMCONVERT_SOUNDNESS=2000 pytest tests/rewrites/test_fuse_soundness.py`` tries as many random networks, other ones.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.fused_networks import with_signs
from tests.support.perturb import perturb
from tests.support.random_convnets import Network

MANY = int(os.environ.get("NORMCONVERT_SOUNDNESS", "0"))
SEEN: Counter[str] = Counter()


def judge(seed: int) -> str:
    """``untraced``, ``kept``, ``fused``; raises AssertionError if a plan is wrong."""
    torch.manual_seed(seed)
    try:
        model = perturb(Network(seed).double().eval(), seed)
        with_signs(model)
        images = [torch.randn(2, 4, 11, 9).double(), torch.randn(3, 4, 12, 13).double()]
        with torch.no_grad():
            expected = model(images[0])
    except (RuntimeError, ValueError):
        return "impossible"
    skeleton = Network(seed).double().eval().to("meta")
    try:
        options = Options(merge_branches=seed % 2 == 0)
        plan = plan_model(skeleton, options, "fuse-bn", lambda m: trace(m, {"image": images[0].to("meta")}))
    except TraceError:
        return "untraced"
    SEEN.update(v.code for v in plan.verdicts)
    assert not [v for v in plan.kept if v.code == "unproved" and "bias" not in v.reason], plan.kept
    if not plan.converted:
        return "kept"
    edited = algebra_model(model, plan)
    for image in images:
        try:
            with torch.no_grad():
                expected = model(image)
        except (RuntimeError, ValueError):
            continue
        with torch.no_grad():
            found = edited(image)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm() / b.norm().clamp_min(1e-300)) <= 1e-10
    assert not set(plan.removed) & set(edited.state_dict())
    return "fused"


@settings(max_examples=MANY or 15, deadline=None, phases=[Phase.explicit, Phase.generate], derandomize=not MANY,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.integers(0, 10**9))
def test_random_networks(seed: int) -> None:
    event(judge(seed))


@pytest.mark.slow
def test_most_random_networks_have_something_to_fuse_and_something_to_keep() -> None:
    found = Counter(judge(seed) for seed in range(24))
    assert found["fused"] >= 6
    assert SEEN["fused-before"] >= 10, SEEN
    assert SEEN["fused-behind"] >= 1, SEEN
    assert SEEN["clipped"] >= 1, SEEN
    assert SEEN["unknown-op"] >= 5, SEEN
