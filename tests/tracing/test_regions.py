"""Regions of a model's forward that export keeps apart: autocast and no_grad."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.tracing.graph import trace
from tests.support.small_models import D, Model, PreNorm, converted, plan_of


class Within(nn.Module):
    """Linear maps that run in a region, and in one within that."""

    def __init__(self, region: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.up, self.down, self.region = nn.Linear(D, 3), nn.Linear(3, D), region

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            y: Tensor = self.up(x)
            with torch.no_grad():
                y = self.down(y)
        return y


@pytest.mark.parametrize(
    "region",
    [
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.autocast("cuda", enabled=False),
        lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
        torch.no_grad,
    ],
    ids=["cpu", "cuda", "with a dtype", "no_grad"],
)
def test_a_region_that_casts_nothing_is_a_part_of_the_graph(
    region: Callable[[], AbstractContextManager[object]],
) -> None:
    plan = plan_of(lambda: Model(PreNorm(Within(region))))
    assert converted(plan) == {"blocks.0.norm", "norm"}


@pytest.mark.parametrize("inner", [False, True])
def test_a_region_in_which_autocast_is_on_is_refused(inner: bool) -> None:
    def region() -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)

    class Nested(Within):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    with torch.device("meta"):
        model = (Nested if inner else Within)(region).eval()
    with pytest.raises(TraceError, match=r"bfloat16 by autocast on cpu"):
        trace(model, {"x": torch.empty(2, D, device="meta")})
