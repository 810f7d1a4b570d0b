"""An operation is known by what it is, and not by a part of its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normconvert.options import Options
from normconvert.tracing.operations import VIEWS, keeps_constants, readers
from tests.support.equivalence import check
from tests.support.small_models import IDS, VOCAB, D, Model, PreNorm, plan_of


@torch.library.custom_op("checks::_assert_finite", mutates_args=())
def _assert_finite(x: Tensor) -> Tensor:
    """An operation that returns its input if it is finite, as a check in a model may."""
    assert bool(x.isfinite().all())
    return x.clone()


@_assert_finite.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Checked(nn.Module):
    """x + gamma * f(norm(x)); what a check of gamma returns is returned, too."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.norm, self.branch, self.gamma = nn.LayerNorm(D), nn.Linear(D, D), nn.Parameter(torch.ones(D))
        self.checks = checks

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.branch(self.norm(x))
        return x * _assert_finite(self.gamma).mean() if self.checks else x


def test_an_operation_that_is_called_an_assertion_reads_the_values_that_it_returns() -> None:
    folded = {"op": "fill", "value": 1.0}
    assert folded in plan_of(lambda: Model(Checked(False))).tensors["blocks.0.gamma"]
    assert "blocks.0.gamma" not in plan_of(lambda: Model(Checked(True))).tensors


class Bagged(nn.Embedding):
    """Embeddings, or the mean of all."""

    def forward(self, ids: Tensor, bag: bool = False) -> Tensor:
        return F.embedding_bag(ids, self.weight, mode="mean") if bag else super().forward(ids)


class Again(nn.Module):
    """A tied table that is looked up for a stream, read by the head, and perhaps used once more."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.embed, self.block, self.norm = Bagged(VOCAB, D), PreNorm(), nn.LayerNorm(D)
        self.head, self.again = nn.Linear(D, VOCAB, bias=False), again
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        logits = self.head(self.norm(self.block(self.embed(ids))))
        return (logits, self.embed(ids, bag=self.again == "bag").sigmoid()) if self.again else logits


@pytest.mark.parametrize("again", ["", "bag", "lookup"])
def test_a_tied_table_is_split_in_two_if_it_has_two_uses(again: str) -> None:
    """A bag of embeddings is no embedding, and not every embedding is of the stream."""
    outcome = check(lambda: Again(again), IDS, Options(tied="untie"))
    assert outcome.plan is not None
    assert not outcome.problems, outcome.problems
    assert ("embed.weight" in outcome.plan.tensors) == (not again)


def test_a_reader_is_who_reads_the_values() -> None:
    graph, aten = fx.Graph(), torch.ops.aten
    x = graph.placeholder("x")
    graph.call_function(aten.zeros_like.default, (x,))
    graph.call_function(aten._assert_tensor_metadata.default, (x,))
    view = graph.call_function(aten.view.default, (x, [-1]))
    bits = graph.call_function(aten.view.dtype, (x, torch.int32))
    graph.call_function(aten.type_as.default, (view, x))
    cast = graph.call_function(aten.type_as.default, (x, view))
    checked = graph.call_function(aten._assert_async.default, (x,))
    assert list(readers(x)) == [view, bits, cast, checked]
    (other,) = readers(view)
    assert list(readers(x, VIEWS)) == [other, bits, cast, checked]


@pytest.mark.parametrize(
    ("pool", "kept"),
    [
        (lambda x: F.avg_pool1d(x[0], 2), True),
        (lambda x: F.avg_pool2d(x, 2, padding=1), False),
        (lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False), True),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), False),
        (lambda x: F.pad(x, (1, 1)), False),
        (lambda x: torch.stack([x, x]), True),
    ],
)
def test_a_constant_is_kept_where_nothing_else_is_averaged_in(pool: Any, kept: bool) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return pool(x)

    x = torch.full((2, 3, 6, 6), 1.7)
    node = [n for n in torch.export.export(Wrapped(), (x,)).graph.nodes if n.op == "call_function"][-1]
    assert keeps_constants(node) == kept == bool((pool(x) - 1.7).abs().max() < 1e-6)
