"""What calls other than ``forward`` make of the tensors that write into a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_graph
from normconvert.tracing.graph import merge, trace
from normconvert.verification.algebra import algebra_model


class Shown(nn.Module):
    """A tensor that writes into the stream makes what a method of features returns, where no norm reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.seen = nn.Embedding(11, 8), nn.Linear(5, 8)
        self.norm, self.head = nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 3)

    def get_image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.seen(pixels)
        return features

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(torch.cat([self.table(ids), self.get_image_features(pixels)], 1)))
        return logits


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_what_a_further_call_returns_moves_with_the_stream(method: str) -> None:
    inputs = {"ids": torch.arange(6).reshape(2, 3), "pixels": torch.randn(2, 4, 5)}
    with torch.device("meta"):
        model = Shown().eval()
    meta = {name: value.to("meta") for name, value in inputs.items()}
    graph = merge(trace(model, meta), trace(model, {"pixels": meta["pixels"]}, "get_image_features"))
    plan: Plan = plan_graph(graph, Options(power="2"), method)
    assert [v.path for v in plan.converted] == ["norm"]
    assert "get_image_features" in {row["door"] for row in plan.shifted_doors}
    truth = Shown().double()
    edited = algebra_model(truth, plan)
    wide = {"ids": inputs["ids"], "pixels": inputs["pixels"].double()}
    torch.testing.assert_close(edited(**wide), truth(**wide), rtol=1e-12, atol=1e-12)
    kept: Plan = plan_graph(graph, Options(power="2", keep_features=True), method)
    assert not kept.converted


class Listed(Shown):
    """The stream is returned in a list with a value for each image, and another call may have more of them."""

    def forward(self, ids: Tensor, pixels: Tensor) -> Any:
        seen = list(self.get_image_features(pixels).unbind(0))
        x = torch.cat([self.table(ids), torch.stack(seen)], 1)
        return {"logits": self.head(self.norm(x)), "seen": seen}


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_a_list_of_values_is_named_as_a_whole(method: str) -> None:
    with torch.device("meta"):
        model = Listed().eval()
    meta = {"ids": torch.zeros(2, 3, dtype=torch.int64, device="meta"), "pixels": torch.randn(2, 4, 5, device="meta")}
    plan: Plan = plan_graph(trace(model, meta), Options(power="2", allow_shifted_outputs=True), method)
    assert [v.path for v in plan.converted] == ["norm"]
    assert plan.shifted_outputs == ["seen"]
