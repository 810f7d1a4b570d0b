"""What a plan divides by is looked at before anything is written."""

from __future__ import annotations

import pytest
import torch

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.verification.running_statistics import check_statistics


@pytest.mark.parametrize(("value", "method", "said"), [
    (0.0, "fold", "norm.weight is zero in 1 of 4 channels: .*`--keep` can leave that norm as it is"),
    (0.0, "rotate", "norm.weight is zero in 1 of 4 channels: .*its stream cannot be rotated"),
    (1e-30, "rotate", "norm.weight is zero, or almost, in 1 of 4 channels"),
    (1e-30, "fold", ""),
    (1e-3, "rotate", ""),
])  # fmt: skip
def test_a_bias_is_not_divided_by_what_is_almost_nothing(value: float, method: str, said: str) -> None:
    """In its own channel a large quotient takes nothing from others; rotated, all of them round by it."""
    tensors = {"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}
    tensors["norm.weight"][2], tensors["norm.weight"][3], tensors["norm.bias"][3] = value, 0.0, 0.0
    plan = Plan(method, tensors={"norm.bias": [{"op": "divide", "by": "norm.weight", "axis": 0}]})
    names = {name: name for name in tensors}
    if not said:
        assert check_statistics(plan, "model", tensors.__getitem__, names) == []
        return
    with pytest.raises(InputError, match=said):
        check_statistics(plan, "model", tensors.__getitem__, names)
