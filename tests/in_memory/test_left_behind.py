"""What a call leaves in the modules is neither proved nor passed over, and stays out of the copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from tests.support.perturb import perturb


class Net(nn.Module):
    def __init__(self, leave: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.leave, self.log, self.table = leave, [], {}  # type: tuple[Any, list[Tensor], dict[str, Tensor]]
        self.emb, self.mid = nn.Linear(5, 8), nn.Linear(8, 8)
        self.first, self.last, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        self.leave(self, x)
        result: Tensor = self.head(self.last(x + self.mid(self.first(x))))
        return result


def attribute(net: Any, x: Tensor) -> None:
    net.kept = x


def table(net: Any, x: Tensor) -> None:
    net.table["stream"] = x


def log(net: Any, x: Tensor) -> None:
    net.log.append(x.detach())


def inner(net: Any, x: Tensor) -> None:
    net.mid.seen = [x]


@pytest.mark.parametrize("method", ["rmsnorm", "fold", "rotate"])
@pytest.mark.parametrize(("leave", "name"), [(attribute, "kept"), (table, "table"), (log, "log"), (inner, "mid.seen")])
def test_it_is_named_as_not_proved(leave: Callable[[Any, Tensor], None], name: str, method: str) -> None:
    net: Any = perturb(Net(leave).eval()).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    made, report = normconvert.convert_model(net, method=method, example_inputs=(x,))
    assert any(f"what a call leaves in `{name}`" in note for note in report.notes), report.notes
    assert net.log == []
    assert "stream" not in net.table
    with torch.no_grad():
        assert torch.allclose(made(x), net(x), atol=1e-12)


def test_a_model_that_leaves_nothing_is_not_told_so() -> None:
    net: Any = perturb(Net(lambda net, x: None).eval())
    _, report = normconvert.convert_model(net, example_inputs=(torch.randn(2, 5),))
    assert not any("leaves in" in note for note in report.notes)
