"""A model on the meta device that believes to be on the CPU, and one that cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.tracing.graph import trace
from normconvert.tracing.probes.asking import call_fake


class Stray(nn.Module):
    """Adds a tensor that is neither a parameter nor a buffer, and says in its own words if it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.table = nn.Linear(4, 4), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.map(x) + self.table
        except Exception as error:
            raise ValueError("the table does not fit") from error


def test_a_tensor_that_stayed_behind_is_noticed_whatever_the_model_says_of_it() -> None:
    with torch.device("meta"):
        model = Stray().eval()
    x = {"x": torch.empty(2, 4, device="meta")}
    assert call_fake(model, model, x).shape == (2, 4)
    assert trace(model, x).nodes


class Failing(nn.Module):
    """Fails for a reason that has nothing to do with devices, and counts how often."""

    calls = 0  # of the class: what a trace leaves in a model is undone

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        Failing.calls += 1
        raise ValueError("the metadata is missing")


def test_an_error_that_speaks_of_something_else_is_none_of_devices() -> None:
    with torch.device("meta"):
        model = Failing().eval()
    with pytest.raises(TraceError, match="metadata is missing"):
        trace(model, {"x": torch.empty(2, 4, device="meta")})
    assert Failing.calls == 1
