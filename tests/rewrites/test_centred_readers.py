"""Who reads x - mean(x) does not see x lose its mean, and sees every other change, such as a layer scale in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.rewrites.planning import plan_graph
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb

D = 8


class Scaled(nn.Module):
    """A gain between a table and a norm; the table's rows, or the table, are returned without their mean as well."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table, self.gain = nn.Parameter(torch.rand(11, D)), nn.Parameter(torch.rand(D))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = nn.functional.embedding(ids, self.table)
        normed = self.norm(x * self.gain)
        if self.kind == "alone":
            return (self.head(normed),)
        read = {"rows": x, "table": self.table, "normed": normed}[self.kind]
        return self.head(normed), read - read.mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["alone", "rows", "table", "normed"])
@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm", "fold", "rotate", "scale"])
def test_a_gain_moves_into_nothing_that_is_read_without_its_mean(method: str, kind: str) -> None:
    ids = torch.arange(10).reshape(2, 5)
    with torch.device("meta"):
        model = Scaled(kind).eval()
    plan = plan_graph(trace(model, {"ids": ids.to("meta")}), Options(power="1", fold=kind == "normed"), method)
    truth = perturb(Scaled(kind).eval()).double()
    edited: Any = algebra_model(truth, plan)
    with torch.no_grad():
        for found, expected in zip(edited(ids), truth(ids), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if kind == "alone":
        assert plan.converted
