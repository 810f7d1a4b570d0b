"""Tensors that the traced call does not read, and another call may write into a stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normconvert.plan.conversion_plan import Plan
from tests.support.equivalence import check
from tests.support.network_parts import param
from tests.support.small_models import IDS, D, Model, PreNorm, converted, verdict


class Masking(Model):
    """Writes ``token`` over what a mask selects, if there is a mask."""

    def __init__(self, token: Callable[[nn.Module], Callable[[], Tensor]]) -> None:
        super().__init__(PreNorm())
        self.token = token(self)

    def forward(self, ids: Tensor, masked: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        if masked is not None:
            x = torch.where(masked[..., None], self.token(), x)
        return {"logits": self.head(self.norm(self.blocks[0](x)))}


def _buffer(*shape: int, persistent: bool = True) -> Callable[[nn.Module], Callable[[], Tensor]]:
    def give(model: nn.Module) -> Callable[[], Tensor]:
        # Not random: buffers keep the values that the constructor gives them.
        model.register_buffer("kept", torch.arange(1.0, D + 1).reshape(shape) / D, persistent=persistent)
        return lambda: model.get_buffer("kept").reshape(D)

    return give


def _parameter(*shape: int) -> Callable[[nn.Module], Callable[[], Tensor]]:
    def give(model: nn.Module) -> Callable[[], Tensor]:
        model.register_parameter("kept", param(*shape))
        return lambda: model.get_parameter("kept").reshape(-1, D)[0]

    return give


def _table(model: nn.Module) -> Callable[[], Tensor]:
    model.add_module("kept", nn.Embedding(4, D // 4))
    return lambda: model.get_parameter("kept.weight").reshape(D)


def planned(make: Callable[[], nn.Module]) -> Plan:
    """The plan of a call without a mask, which is right with one."""
    masked = [{**one, "masked": torch.rand(one["ids"].shape) < 0.5} for one in IDS]
    outcome = check(make, [*IDS, *masked])
    assert not outcome.problems, "\n".join(outcome.problems)
    assert outcome.plan is not None
    return outcome.plan


@pytest.mark.parametrize(
    "token",
    [
        *[_buffer(D), _buffer(1, 1, D), _buffer(4, D // 4), _buffer(D, persistent=False)],
        *[
            _parameter(D),
            _parameter(4, D // 4),
            _parameter(D // 4, 4),
            _parameter(12, D // 4),
            _parameter(3, D),
            _table,
        ],
    ],
    ids=[
        *["buffer", "broadcast buffer", "factored buffer", "buffer that no checkpoint holds"],
        *["parameter", "factored", "factored the other way", "several, factored", "several", "embedding"],
    ],
)
def test_what_an_untraced_call_may_write_into_the_stream_keeps_its_norms(
    token: Callable[[nn.Module], Callable[[], Tensor]],
) -> None:
    plan = planned(lambda: Masking(token))
    assert not plan.converted
    assert verdict(plan, "norm").code == "unread"
    assert "`kept" in verdict(plan, "norm").reason


@pytest.mark.parametrize(
    "buffer",
    [
        torch.arange(D),
        torch.ones(D, D, dtype=torch.bool),
        torch.rand(D // 2),
        torch.tensor(1e-5),
        torch.rand(5, 3),
        torch.empty(0, D),
    ],
    ids=["indices", "mask", "frequencies", "number", "relative positions", "empty"],
)
@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_does_not_fill_the_channels_is_no_reason(buffer: Tensor, persistent: bool) -> None:
    def make() -> nn.Module:
        model = Model(PreNorm())
        floating = buffer.is_floating_point()
        made = torch.zeros(buffer.shape, dtype=torch.get_default_dtype() if floating else buffer.dtype)
        model.register_buffer("kept", made, persistent=persistent)
        return model

    outcome = check(make, IDS)
    assert not outcome.problems
    assert outcome.plan is not None
    assert converted(outcome.plan) == {"blocks.0.norm", "norm"}


class Prepared(Model):
    """Makes ready for every call what it adds only where it is told to; ``pools``: and what it returns only then."""

    def __init__(self, kind: str) -> None:
        super().__init__(PreNorm())
        self.kind = kind
        if kind != "positions":
            self.token = param(1, D)
        if kind in ("projected", "adapter"):
            self.project = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))
        if kind == "positions":
            self.positions = nn.Embedding(64, D)
        if kind == "pooler":
            self.pool = nn.Linear(D, D)

    def forward(self, ids: Tensor, masked: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        if self.kind == "positions":
            more = self.positions(torch.arange(ids.shape[1], device=ids.device))
        elif self.kind == "ids":
            more = self.embed(ids) * 2 + self.token
        elif self.kind == "like":
            more = self.token.expand_as(x)
        elif self.kind == "mask":
            more = self.token * (ids > 2).to(x.dtype)[..., None]
        elif self.kind == "chunks":
            more = self.token.expand(*ids.shape, -1) * torch.cat(ids.chunk(2, 1), 1)[..., None]
        elif self.kind == "joined":
            more = (x + self.token) - x
        elif self.kind == "adapter":
            more = self.project(x)
        else:
            more = self.token.expand(*ids.shape, -1)
        if self.kind == "projected":
            more = self.project(more)
        if self.kind == "pooler":
            more = self.pool(self.norm(x)[:, 0] * self.token)
        if masked is not None and self.kind != "pooler":
            x = x + more * masked[..., None]
        return {"logits": self.head(self.norm(self.blocks[0](x)))}


@pytest.mark.parametrize(
    "kind", ["stretched", "projected", "positions", "ids", "like", "mask", "chunks", "joined", "adapter"]
)
def test_what_a_call_makes_ready_and_does_not_use_counts_as_unread(kind: str) -> None:
    plan = planned(lambda: Prepared(kind))
    assert not plan.converted
    assert verdict(plan, "norm").code == "unread"


def test_what_is_made_of_the_stream_and_of_no_use_is_a_part_of_the_model() -> None:
    assert converted(planned(lambda: Prepared("pooler"))) == {"blocks.0.norm", "norm"}


def test_a_part_that_is_only_asked_for_its_shape_is_no_reader() -> None:
    class Asking(Model):
        def __init__(self) -> None:
            super().__init__(PreNorm())
            self.positions = param(16, D)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            x = self.embed(ids)
            x = x + self.positions[: x[..., -1].shape[1]]
            return {"logits": self.head(self.norm(self.blocks[0](x)))}

    outcome = check(Asking, IDS)
    assert not outcome.problems
    assert outcome.plan is not None
    assert converted(outcome.plan) == {"blocks.0.norm", "norm"}
