"""The comparison of an edited model's graph with the original's, in its own terms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from normconvert.rewrites.retrace import _Comparison
from normconvert.tracing.graph import trace


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (math.nan, math.nan, True),
        (math.nan, 0.5, False),
        (0.5, math.nan, False),
        (1, True, False),
        ([1, math.nan], [1, 2.0], False),
        ({"eps": 1e-5}, {"eps": 1e-5}, True),
        ({"eps": 1e-5}, {"eps": 1e-6}, False),
    ],
)
def test_arguments_are_the_same_only_if_they_are(old: object, new: object, same: bool) -> None:
    graph = trace(nn.Linear(2, 2).to("meta").eval(), {"input": torch.zeros(1, 2, device="meta")})
    comparison = object.__new__(_Comparison)
    comparison.old = comparison.new = graph
    comparison.image = {}
    assert comparison._same(old, new) is same
