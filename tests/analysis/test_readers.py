"""Readers of a stream: operands that a rule does not name, and means of other axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from normconvert.analysis.channel_axes import ChannelAxis
from normconvert.analysis.streams import Analysis
from normconvert.tracing.graph import Graph
from tests.support.equivalence import check
from tests.support.network_parts import Op
from tests.support.small_models import VOCAB, D, Model, PreNorm, converted


def test_an_operand_that_its_rule_does_not_name_is_a_leak() -> None:
    """No model has channels in the value of a masked_fill yet; its rule says nothing of them, so they may not pass."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "mask", "value")]
    for node, value in zip(nodes, (torch.rand(2, D), torch.ones(2, 1, dtype=torch.bool), torch.rand(D)), strict=True):
        node.meta["val"] = value
    filled = graph.call_function(torch.ops.aten.masked_fill.Tensor, tuple(nodes))
    filled.meta["val"] = torch.rand(2, D)
    graph.output(filled)
    analysis = Analysis(Graph(tuple(graph.nodes), {}, {filled: ("output",)}, {}, {}), [])
    (named,) = analysis.uses((nodes[0], ChannelAxis(1, D)))
    assert named.to == (filled, ChannelAxis(1, D))
    (unnamed,) = analysis.uses((nodes[2], ChannelAxis(0, D)))
    assert unnamed.to is None
    assert unnamed.leak is not None
    assert unnamed.leak.code == "unknown-op"


@pytest.mark.parametrize("part", ["norm", "reader"])
def test_a_mean_that_loses_its_axis_is_subtracted_from_other_channels(part: str) -> None:
    """With as many tokens as channels it is broadcast along the tokens: x - mean(x) is not P x then."""

    def by_hand(m: Any, x: Tensor) -> Tensor:
        y = x - x.mean(-1)
        return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5)

    def reads(m: Any, x: Tensor) -> Tensor:
        y: Tensor = x + m.l(x - x.mean(-1))
        return y

    def block() -> nn.Module:
        if part == "reader":
            return Op(reads, l=nn.Linear(D, D))
        made = PreNorm()
        made.norm = Op(by_hand)
        return made

    square = [{"ids": torch.randint(0, VOCAB, (1, D))} for _ in range(2)]
    outcome = check(lambda: Model(block()), square)
    assert not outcome.problems
    assert outcome.plan is not None
    assert converted(outcome.plan) == set()
