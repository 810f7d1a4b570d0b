"""Classes made on demand, which stand before those of modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn

from normconvert.runtime.modules import Derived, derive


class Doubled(Derived):
    """Twice what the module gives, and ``more``."""

    more: float

    @classmethod
    def members(cls, kind: Any, *settings: Any) -> dict[str, Any]:
        return {"more": settings[0]}

    def forward(self: Any, x: torch.Tensor) -> Any:
        return 2 * super().forward(x) + self.more  # type: ignore[misc]


class Raised(Derived):
    """Three more than the module gives."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        return super().forward(x) + 3.0  # type: ignore[misc]


def test_several_before_one_class_are_copied_and_pickled_in_their_order() -> None:
    linear = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = 2 * linear(x) + 1.0 + 3.0
    linear.__class__ = derive(derive(nn.Linear, Doubled, 1.0), Raised)
    for module in (linear, copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(module(x), expected)
        assert isinstance(module, nn.Linear)
        assert (type(module).__name__, type(module).__module__) == ("Linear", nn.Linear.__module__)
    assert derive(nn.Linear, Doubled, 1.0) is derive(nn.Linear, Doubled, 1.0)
