"""The vectors of a clamp: relu(a x + b) = scale * clamp(x - start, lower, upper) for every x within the limit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from normconvert.plan.vectors import evaluate

LIMIT = 65504.0
"""Largest number of float16."""


def number(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_nan=False, allow_subnormal=True)


@given(a=number(-3, 3) | st.sampled_from([0.0, 1e-9, -1e-9, 1e-310, -5e-324]), b=number(-5, 5), x=number(-LIMIT, LIMIT))
@example(a=0.0, b=0.0, x=1.0)
@example(a=0.0, b=2.0, x=1.0)
@example(a=1e-9, b=-1.0, x=LIMIT)
@example(a=-1e-9, b=-1.0, x=-LIMIT)
@example(a=-1e-9, b=1.0, x=3.0)
def test_relu_of_an_affine_map_is_a_multiple_of_a_clamp(a: float, b: float, x: float) -> None:
    tensors = {"a": torch.tensor([a], dtype=torch.float64), "b": torch.tensor([b], dtype=torch.float64),
               "w": torch.empty(1, dtype=torch.float16)}  # fmt: skip
    try:
        scale, start, lower, upper = (
            float(evaluate([f"clip_{key}", "a", "b", ["limit", "w"]], tensors.__getitem__, bound=key != "start"))
            for key in ("scale", "start", "lower", "upper")
        )
    except ValueError:
        assert b > 0, "a channel that is always on cannot do without its start"
        assert math.isinf(b / a)
        return
    expected = max(a * x + b, 0.0)
    found = scale * min(max(x - start, lower), upper)
    assert math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-13 * max(abs(a * x), abs(b), 1e-300))
    assert lower <= upper


def test_a_scale_must_be_finite_and_a_bound_must_be_a_number() -> None:
    tensors = {"v": torch.tensor([-1.0]), "b": torch.tensor([0.0]), "w": torch.empty(1)}
    scale = ["rsqrt", "v"]
    with pytest.raises(ValueError, match="made of v is not finite"):
        evaluate(scale, tensors.__getitem__)
    with pytest.raises(ValueError, match="made of v, b is not finite"):
        evaluate(["clip_start", scale, "b", ["limit", "w"]], tensors.__getitem__)
