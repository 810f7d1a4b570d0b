"""Small networks around one question, and what a plan says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from tests.support.equivalence import check

B, T, D, VOCAB = 2, 6, 8, 11
IDS = [{"ids": torch.randint(0, VOCAB, (B, T))} for _ in range(2)]
Build = Callable[[], nn.Module]


def plan_of(build: Build, **options: Any) -> Plan:
    """The plan for a network that reads ``ids``, checked to be right."""
    outcome = check(build, IDS, Options(**options))
    assert outcome.plan is not None, outcome.problems
    assert not outcome.problems, "\n".join(outcome.problems)
    return outcome.plan


def verdict(plan: Plan, path: str) -> Verdict:
    return next(v for v in plan.verdicts if v.path == path)


def converted(plan: Plan) -> set[str]:
    return {v.path for v in plan.converted}


def centred(plan: Plan) -> set[str]:
    """Names of the tensors that are centred."""
    return {name for name, edits in plan.tensors.items() if any(e["op"] == "center" for e in edits)}


def inserted(plan: Plan) -> list[tuple[str, str]]:
    """The centring operations: module and side."""
    return [(m["path"], m["side"]) for m in plan.modules if m["op"] == "center"]


class PreNorm(nn.Module):
    """x + f(norm(x)), with anything for f; ``post`` puts the norm behind the sum."""

    def __init__(self, branch: nn.Module | None = None, post: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(D)
        self.branch, self.post = branch or nn.Linear(D, D), post

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.branch(x)) if self.post else x + self.branch(self.norm(x))
        return y


class Model(nn.Module):
    """Embedding, blocks, a last norm and a head."""

    def __init__(
        self, *blocks: nn.Module, tied: bool = False, returned: bool = False, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embed: Any = nn.Embedding(VOCAB, D)
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(D)
        self.head = head or nn.Linear(D, VOCAB, bias=False)
        self.returned = returned
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        outputs = {"logits": self.head(self.norm(x))}
        return {**outputs, "hidden": x} if self.returned else outputs
