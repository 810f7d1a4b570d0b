"""Classes made on demand, which stand before those of modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from normconvert.runtime.modules import Derived, derive, run_by_calls


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


def test_torchs_encoder_layer_is_refused_where_it_does_not_say_how_it_calls_its_norms() -> None:
    layer, other = (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu") for _ in range(2))
    model = nn.Sequential(layer, other)
    run_by_calls(model, layer.norm1)
    assert not layer.activation_relu_or_gelu
    assert other.activation_relu_or_gelu
    del other.activation_relu_or_gelu
    with pytest.raises(ValueError, match="activation_relu_or_gelu"):
        run_by_calls(model, other.norm2)
    run_by_calls(model, nn.LayerNorm(8))  # of another module
