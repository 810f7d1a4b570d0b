"""An operation is known by what it is, and not by a part of its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.options import Options
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
