"""Marks and writes in place: a mark stays where it tells the truth, and goes where it would hide a write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normconvert.probes.builders import call_fake
from normconvert.tracing import Graph, trace
from normconvert.writes import MARK


class Branch(nn.Module):
    """A linear map, and what joins its result and its input."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.map, self.join = nn.Linear(4, 4), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.map(x), x)


class Model(nn.Module):
    """What the branch reads is read again after it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(4, 4), Branch(join)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cat([self.branch(y), y], -1)


def marked(join: Callable[[Tensor, Tensor], Tensor]) -> set[tuple[str, str]]:
    with torch.device("meta"):
        model = Model(join).eval()
    graph: Graph = trace(model, {"x": torch.empty(2, 4, device="meta")})
    return {(str(n.args[1]), str(n.args[2])) for n in graph.nodes if n.target is MARK}


@pytest.mark.parametrize(
    "join",
    [
        lambda out, x: out.add_(x),
        lambda out, x: out.mul_(x).relu_(),
        lambda out, x: out.addcmul_(x, x),
        lambda out, x: torch.add(out, x, out=torch.empty_like(out)),
        lambda out, x: out.copy_(x),
    ],
    ids=["add", "mul", "addcmul", "out", "copy"],
)
def test_what_a_write_reads_is_no_name_of_what_it_writes(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert marked(join) == {("branch", "input"), ("branch", "output")}


@pytest.mark.parametrize(
    "join",
    [
        lambda out, x: x.add_(out),
        lambda out, x: x.view(-1, 2, 2).add_(1.0).view(-1, 4) + out,
        lambda out, x: x.to(x.dtype).add_(out),
        lambda out, x: x.chunk(2, -1)[0].mul_(2.0) + out[..., :2],
        lambda out, x: torch.meshgrid(x[0], x[1], indexing="ij")[0].add_(0.0).sum() + out,
    ],
    ids=["itself", "view", "idle_cast", "part", "stretched"],
)
def test_a_mark_that_would_hide_a_write_goes(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert ("branch", "input") not in marked(join)


class Remembers(nn.Module):
    """Keeps a table in a dictionary of its own once it runs for inference, as LeViT's attention does, and the last."""

    last: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.table, self.known = nn.Parameter(torch.zeros(3, 4)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "rows" not in self.known:
            self.known["rows"] = self.table[torch.tensor([0, 2, 1])]
        self.last = self.known["rows"] if self.last is None else self.last
        return x + self.last.sum(0)


def test_a_table_that_a_module_remembers_does_not_outlive_a_run_on_fake_tensors() -> None:
    with torch.device("meta"):
        model = Remembers().eval()
    x = {"x": torch.empty(2, 4, device="meta")}
    assert call_fake(model, model, x).shape == (2, 4)
    assert model.known == {}
    assert model.last is None
    graph = trace(model, x)
    assert [p.name for p in graph.parameters.values() if p.stored] == ["table"]
    assert model.known == {}
    assert model.last is None
