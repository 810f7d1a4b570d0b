"""A marker is noted in the graph without being run, and the graph is the one of a trace that runs it."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.compat import lean_export
from normconvert.tracing import known_values
from normconvert.tracing.graph import Graph, trace
from normconvert.tracing.in_place_writes import MARKER
from normconvert.tracing.model_graph import trace_model
from tests.support import tiny_checkpoints

PROXIES = "torch.fx.experimental.proxy_tensor"


class Writing(nn.Module):
    """Values that are known, a constant, a write in place, a transposed result and several outputs of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.soft = nn.LayerNorm(4), nn.Softmax(dim=-1)
        self.inner = nn.Sequential(nn.LayerNorm(4), nn.Softmax(dim=-1))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x)
        y[0] = self.norm(torch.ones(2, 4))[0]
        rows = x[self.soft(mask)[:, 0] > 0.1]  # floating and known
        return self.inner(y[None].transpose(0, 1)), rows, self.norm(y.relu_())


def lines(graph: Graph) -> list[tuple[str, ...]]:
    """All that a graph says of its nodes."""
    return [
        tuple(map(str, (n, n.op, n.target, n.args, n.kwargs, n.meta.get("val"), n.meta["normconvert_path"])))
        for n in graph.nodes
    ]


def writing() -> Graph:
    return trace(Writing().to("meta"), {"x": torch.ones(3, 4), "mask": torch.ones(3, 4)})


def text() -> Graph:
    return trace_model(tiny_checkpoints.gpt2_without_head().to("meta"))


@pytest.mark.parametrize("traced", [writing, text])
def test_the_graph_is_that_of_markers_that_run(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    original = torch.empty_like

    def empty_like(x: Tensor, **how: Any) -> Tensor:
        run.append(sys._getframe(1).f_code.co_name)
        return original(x, **how)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    found = lines(traced())
    assert run.count("noted") > 4, "markers are run"
    monkeypatch.setattr(known_values, "noted", lambda operation, x, *settings: operation(x, *settings))
    assert found == lines(traced())
    assert sum(target == str(MARKER) for _, _, target, *_ in found) > 4


@pytest.mark.parametrize("name", ["get_proxy_mode", "get_proxy_slot", "track_tensor_tree"])
def test_without_a_private_name_markers_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lines(writing())

    real = importlib.import_module
    lacking = SimpleNamespace(**{key: getattr(real(PROXIES), key) for key in lean_export.NOTING if key != name})
    monkeypatch.setattr(importlib, "import_module", lambda path: lacking if path == PROXIES else real(path))
    assert lines(writing()) == expected
