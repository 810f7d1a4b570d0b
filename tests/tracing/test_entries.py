"""Arguments of parts that the whole model has none for: the tensors that they need are read in a call of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.entries import entered, entry_of_part, parts_that_take
from normconvert.tracing.model_graph import trace_model
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb

D = 8


class Embeddings(nn.Module):
    """Patches, some of which may be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.mask_token = nn.Conv2d(3, D, 4, 4), nn.Parameter(torch.empty(1, 1, D))

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        return x if bool_masked_pos is None else torch.where(bool_masked_pos.unsqueeze(-1), self.mask_token, x)


class Fusion(nn.Module):
    """Adds what an earlier layer gives, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin, self.skip = nn.RMSNorm(D, eps=1e-6), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = x + self.lin(self.norm(x))
        return y if residual is None else y + self.skip(residual)


class Leveled(nn.Module):
    """Gives a part its residual, which is the stream, for an argument that no traced call has a value like."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.part, self.norm = Embeddings(), Fusion(), nn.RMSNorm(D, eps=1e-6)
        self.head = nn.Linear(D, 3)
        self.config = SimpleNamespace(image_size=8, patch_size=4)

    def forward(self, pixel_values: Tensor, level: int | None = None) -> Tensor:
        x = self.embeddings(pixel_values)
        x = self.part(x, residual=x) if level is not None and level > 1 else self.part(x)
        found: Tensor = self.head(self.norm(x))
        return found


class Depth(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.leaks = leaks
        self.embeddings, self.first, self.inner = Embeddings(), nn.LayerNorm(D), nn.Linear(D, D)
        self.last, self.read = nn.LayerNorm(D), nn.Linear(D, D)
        self.config = SimpleNamespace(image_size=8, patch_size=4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings(pixel_values)
        x = x + self.inner(self.first(x))
        found: Tensor = self.read(self.last(x))
        return found + x.square() if self.leaks else found


def planned(method: str, **changes: Any) -> tuple[Plan, nn.Module]:
    with torch.device("meta"):
        skeleton = Depth(**changes).eval()
    return plan_model(skeleton, Options(power="2"), method), skeleton


@pytest.mark.parametrize("method", ["rmsnorm", "rotate", "scale"])
def test_what_a_part_alone_may_be_asked_for_is_converted_too(method: str) -> None:
    plan, skeleton = planned(method)
    assert not plan.kept, [(v.path, v.reason) for v in plan.kept]
    assert "embeddings.mask_token" in plan.tensors
    assert not trace_model(skeleton).unreached
    truth = Depth().eval().double()
    perturb(truth)
    edited: Any = algebra_model(truth, plan)
    x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).sin().reshape(2, 3, 8, 8)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    masked = entry_of_part("embeddings", "bool_masked_pos")
    with torch.no_grad():
        plain, given = truth(x), entered(truth, masked)(x, bool_masked_pos=mask)
        assert not torch.allclose(plain, given)
        torch.testing.assert_close(edited(x), plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entered(edited, masked)(x, bool_masked_pos=mask), given, rtol=1e-9, atol=1e-9)
    assert not edited.embeddings._forward_pre_hooks


def test_what_such_a_call_shows_counts_as_any_other() -> None:
    plan, _ = planned("rotate", leaks=True)
    assert not plan.converted
    assert {v.code for v in plan.kept} == {"unknown-op"}


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_no_value_is_invented_for_what_could_be_a_stream(method: str) -> None:
    with torch.device("meta"):
        plan = plan_model(Leveled().eval(), Options(power="2"), method)
    assert not plan.converted
    assert any("`part.skip.weight` fits this stream" in verdict.reason for verdict in plan.kept)


def test_a_part_is_the_innermost_that_holds_the_tensor_and_need_not_be_given_the_argument() -> None:
    model = nn.ModuleDict({"outer": nn.ModuleDict({"part": Fusion()}), "embeddings": Embeddings()})
    assert list(parts_that_take(model, "residual", {"outer.part.skip.weight", "outer.part.skip.bias"})) == [
        "outer.part"
    ]
    assert list(parts_that_take(model, "pixel_values", {"embeddings.mask_token"})) == []
    assert list(parts_that_take(model, "residual", {"embeddings.mask_token"})) == []


def test_patches_of_no_size_are_no_reason_to_fail() -> None:
    with torch.device("meta"):
        model = Depth().eval()
    model.config.patch_size = 0
    assert "embeddings.mask_token" in trace_model(model).unreached
