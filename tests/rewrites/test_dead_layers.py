"""Layers behind the last whose result is read: hidden states return what they give, and no output is made of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb

D = 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


class Tower(nn.Module):
    """A tower of whose layers the last but one is read, as a vision-language model reads its tower of vision.

    Args:
        final: its norm is called with what each of the last two layers gives, and one of the results is used.
    """

    main_input_name = "input_ids"

    def __init__(self, final: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, D)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.norm, self.head, self.final = nn.LayerNorm(D), nn.Linear(D, 3), final
        self.config = SimpleNamespace(vocab_size=32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(self.norm(x) if self.final else x)
        logits: Tensor = self.head(states[-2] if self.final else self.norm(states[-2]))
        return logits


def converted(method: str, final: bool) -> tuple[Plan, Any, Any]:
    with torch.device("meta"):
        skeleton = Tower(final).eval()
    plan = plan_model(skeleton, Options(power="2"), method)
    truth = perturb(Tower(final).eval()).double()
    return plan, truth, algebra_model(truth, plan)


def states(model: Any, ids: Tensor) -> list[Tensor]:
    """What each layer gives, and the output last."""
    found: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, y: found.append(y)) for layer in model.layers]
    with torch.no_grad():
        found.append(model(ids))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("method", ["rmsnorm", "rotate", "scale"])
def test_layers_whose_result_only_hidden_states_return_are_converted_too(method: str, final: bool) -> None:
    plan, truth, other = converted(method, final)
    assert not plan.kept, [(v.path, v.reason) for v in plan.kept]
    ids = torch.arange(14).reshape(2, 7)
    *before, given = states(truth, ids)
    *after, found = states(other, ids)
    torch.testing.assert_close(found, given, rtol=1e-9, atol=1e-9)
    for a, b in zip(before, after, strict=True):
        assert not torch.allclose(a, b)
        # What all three keep of what they are named after: the mean apart, products but for a number.
        one, two = ((x - x.mean(-1, keepdim=True)) for x in (a, b))
        products, others = one @ one.mT, two @ two.mT
        torch.testing.assert_close(others * (products.norm() / others.norm()), products, rtol=1e-9, atol=1e-9)
    assert {row["output"] for row in plan.shifted_doors} >= {"layers.1", "layers.2"}


@pytest.mark.parametrize("final", [False, True])
def test_their_norms_are_folded_and_compressed(final: bool) -> None:
    ids = torch.arange(14).reshape(2, 7)
    for method, same in (("fold", True), ("crmsnorm", False)):
        plan, truth, other = converted(method, final)
        assert not plan.kept, [(v.path, v.reason) for v in plan.kept]
        *before, given = states(truth, ids)
        *after, found = states(other, ids)
        torch.testing.assert_close(found, given, rtol=1e-9, atol=1e-9)
        assert all(
            torch.allclose(a, b) if same else a.shape[-1] == b.shape[-1] + 1 for a, b in zip(before, after, strict=True)
        )


class Aside(nn.Module):
    """What it makes is returned if it is told to by a tensor, which no call of a trace gives."""

    main_input_name = "input_ids"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.config = kind, SimpleNamespace(vocab_size=32)
        self.embed, self.block = nn.Embedding(32, D), Layer()
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)
        if kind == "another call":
            self.up = nn.Linear(3, D)
        if kind != "head":
            self.aside = nn.Linear(D, 5)

    def forward(self, input_ids: Tensor, entity_mask: Tensor | None = None) -> Tensor:
        early = self.embed(input_ids)
        logits: Tensor = self.head(self.norm(self.block(early)))
        if self.kind == "another call":
            other = self.aside(self.norm(torch.relu(self.up(logits))))
        elif self.kind == "earlier":
            other = self.aside(self.norm(early))
        else:
            other = nn.functional.linear(self.norm(self.block(early)), self.embed.weight)
        if entity_mask is not None:
            return torch.where(entity_mask[..., None], other, 0.0)
        return logits


@pytest.mark.parametrize("kind", ["another call", "earlier", "head"])
@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm", "fold", "rotate", "scale"])
def test_what_one_call_makes_of_no_use_another_may_return(method: str, kind: str) -> None:
    with torch.device("meta"):
        plan = plan_model(Aside(kind).eval(), Options(power="2"), method)
    truth = perturb(Aside(kind).eval()).double()
    other: Any = algebra_model(truth, plan)
    ids, mask = torch.arange(14).reshape(2, 7), torch.arange(14).reshape(2, 7) % 2 == 0
    with torch.no_grad():
        for given in (None, mask):
            torch.testing.assert_close(other(ids, given), truth(ids, given), rtol=1e-9, atol=1e-9)
    # In the first, what the norm reads once keeps it; the others are no obstacle, but to methods that a tie stops.
    assert plan.converted or (method, kind) not in (
        ("rmsnorm", "earlier"),
        ("fold", "another call"),
        ("rotate", "earlier"),
    )


class Hidden(Tower):
    """Layers whose results have no marker: written to in place, or within an object."""

    def __init__(self, kind: str) -> None:
        super().__init__(False)
        self.kind = kind

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * 1.0
        for layer in self.layers:
            if self.kind == "in place":
                layer(x)
            else:
                x = layer(x).value
        logits: Tensor = self.head(self.norm(x))
        return logits


class Wrapping(Layer):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(value=super().forward(x))


class Adding(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.down(torch.relu(self.up(self.norm(x * 1.0)))))


@pytest.mark.parametrize("kind", ["in place", "object"])
@pytest.mark.parametrize("method", ["rmsnorm", "rotate"])
def test_hidden_states_that_have_no_marker_are_not_proved_and_not_kept(method: str, kind: str) -> None:
    with torch.device("meta"):
        model = Hidden(kind).eval()
        model.layers = nn.ModuleList([Wrapping() if kind == "object" else Adding() for _ in range(3)])
        plan, kept = (plan_model(model, Options(keep_features=keep), method) for keep in (False, True))
    assert plan.converted
    assert "hidden_states" in plan.untraced_doors
    assert "hidden_states" in " ".join(plan.notes)
    assert not kept.converted
    assert any("--keep-features keeps" in verdict.reason for verdict in kept.kept)
