"""One norm or one layer that cannot be edited stays as it is, with a reason; the rest of the model converts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.graph import trace
from normconvert.tracing.model_copy import copy_model
from normconvert.verification.algebra import algebra_model
from tests.support.equivalence import check
from tests.support.small_models import D, Model, PreNorm, converted, plan_of, verdict

OTHERS = {"blocks.0.norm", "norm"}


class Counting(nn.LayerNorm):
    """Keeps a statistic that it does not use."""

    def __init__(self, persistent: bool) -> None:
        super().__init__(D)
        self.register_buffer("seen", torch.zeros(3), persistent=persistent)


class Factored(nn.Module):
    """Stores its weight and bias in another shape than it applies them in."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), self.weight.view(-1), self.bias.view(-1))


class FactoredByHand(Factored):
    """The same, written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5)
        return y * self.weight.view(-1) + self.bias.view(-1)


class Resting(nn.LayerNorm):
    """Has a child that nothing calls."""

    def __init__(self) -> None:
        super().__init__(D)
        self.dropout = nn.Dropout(0.1)


class TwoNames(nn.LayerNorm):
    """Has its weight under a second name."""

    def __init__(self) -> None:
        super().__init__(D)
        self.gamma = self.weight


class Frozen(nn.LayerNorm):
    """Has its weight in a buffer."""

    def __init__(self) -> None:
        super().__init__(D)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class Remembering(nn.LayerNorm):
    """Stores more than tensors."""

    def __init__(self) -> None:
        super().__init__(D)

    def get_extra_state(self) -> object:
        return torch.ones(1)

    def set_extra_state(self, state: object) -> None:
        pass


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrized() -> nn.Module:
    norm = nn.LayerNorm(D)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


def _hooked() -> nn.Module:
    norm = nn.LayerNorm(D)
    norm.register_forward_hook(lambda module, args, output: output * module.weight)
    return norm


def _old_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    wrap: Any = torch.nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: nn.Module = wrap(module, dim=dim)
    return wrapped


ODD_NORMS: dict[str, Callable[[], nn.Module]] = {
    "a buffer": lambda: Counting(True),
    "a buffer that no checkpoint holds": lambda: Counting(False),
    "a factored weight": lambda: Factored(2, D // 2),
    "a column": lambda: Factored(D, 1),
    "more dimensions than the input": lambda: Factored(1, 1, 1, D),
    "a factored weight, by hand": lambda: FactoredByHand(2, D // 2),
    "a child": Resting,
    "two names": TwoNames,
    "a weight in a buffer": Frozen,
    "extra state": Remembering,
    "a parametrization": _parametrized,
    "old weight_norm": lambda: _old_weight_norm(nn.LayerNorm(D), None),
    "weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.LayerNorm(D), dim=-1),
}


def _block(norm: nn.Module) -> PreNorm:
    block = PreNorm()
    block.norm = norm
    return block


@pytest.mark.parametrize("odd", ODD_NORMS)
def test_a_norm_that_is_more_than_a_norm_stays_alone(odd: str) -> None:
    plan = plan_of(lambda: Model(PreNorm(), _block(ODD_NORMS[odd]())))
    assert converted(plan) == OTHERS
    assert verdict(plan, "blocks.1.norm").code == "not-a-module"


def test_what_a_hook_is_given_stays_as_it_is() -> None:
    # It is given the stream itself, and may keep it.
    plan = plan_of(lambda: Model(PreNorm(), _block(_hooked())))
    assert converted(plan) == set()
    assert "a hook of blocks.1.norm is given" in verdict(plan, "blocks.0.norm").reason


def test_what_a_norm_holds_besides_is_named() -> None:
    assert "`seen`" in verdict(plan_of(lambda: Model(_block(Counting(True)))), "blocks.0.norm").reason
    assert "2x4" in verdict(plan_of(lambda: Model(_block(Factored(2, 4)))), "blocks.0.norm").reason


@pytest.mark.parametrize("shape", [(1, D), (1, 1, D)])
def test_a_weight_that_is_broadcast_as_it_is_stored_is_no_obstacle(shape: tuple[int, ...]) -> None:
    assert converted(plan_of(lambda: Model(PreNorm(), _block(Factored(*shape))))) == OTHERS | {"blocks.1.norm"}


class Image(nn.Module):
    """A norm over the channels of an image, which calls layer_norm on the permuted image."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, D, 1), ImageNorm(*shape), nn.Conv2d(D, 5, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(pixels)))
        return y


class ImageNorm(Factored):
    """The norm of :class:`Image`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_weight_that_lies_along_the_channels_of_an_image_is_not_taken_for_one_along_the_last_dimension() -> None:
    # As wide as it has channels, so that nothing fails where the weight is applied along the wrong dimension.
    pixels = [{"pixels": torch.randn(2, 3, D, D, dtype=torch.float64)}]
    for shape, expected in {(D,): {"norm"}, (1, 1, D): {"norm"}, (D, 1, 1): set()}.items():
        outcome = check(lambda shape=shape: Image(*shape), pixels, axes={"output": 1})  # type: ignore[misc]
        assert not outcome.problems
        assert outcome.plan is not None
        assert converted(outcome.plan) == expected


@pytest.mark.parametrize("how", ["old", "new"])
def test_a_layer_with_weight_norm_taints_what_is_behind_it_and_nothing_else(how: str) -> None:
    wrap = _old_weight_norm if how == "old" else torch.nn.utils.parametrizations.weight_norm
    plan = plan_of(lambda: Model(PreNorm(), PreNorm(wrap(nn.Linear(D, D)))), min_gain=9)
    assert converted(plan) == {"blocks.0.norm", "blocks.1.norm"}
    assert "_weight_norm" in verdict(plan, "norm").reason


def test_a_norm_that_is_registered_twice_is_converted_once() -> None:
    def build() -> nn.Module:
        model = Model(PreNorm(), PreNorm())
        model.blocks[1].norm = model.blocks[0].norm
        return model

    assert converted(plan_of(build)) == OTHERS


class Picture(nn.Module):
    """Convolutions with BatchNorms behind them."""

    def __init__(self, second: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, D, 3, bias=False), nn.BatchNorm2d(D)
        self.second, self.two = second(nn.Conv2d(D, D, 3, bias=False)), nn.BatchNorm2d(D)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.relu(self.two(self.second(F.relu(self.one(self.first(pixels))))))


def test_a_convolution_with_weight_norm_keeps_its_batch_norm_and_the_others_fuse() -> None:
    model = Picture(_old_weight_norm).double().eval()
    pixels = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.device("meta"):
        skeleton = Picture(_old_weight_norm).double().eval()

    plan = plan_model(skeleton, Options(), "fuse-bn", lambda m: trace(m, {"pixels": pixels.to("meta")}))
    assert converted(plan) == {"one"}
    with torch.no_grad():
        torch.testing.assert_close(algebra_model(model, plan)(pixels), model(pixels), rtol=1e-10, atol=1e-12)


def test_a_copy_has_what_its_modules_worked_out_and_leaves_the_model_alone() -> None:
    model: Any = nn.Sequential(_old_weight_norm(nn.Linear(D, D)))
    worked_out = model[0].weight
    copied = copy_model(model)
    assert model[0].weight is worked_out
    assert worked_out.grad_fn is not None
    assert copied[0].weight is not worked_out
    ids = torch.randn(2, D)
    torch.testing.assert_close(copied(ids), model(ids))
    copied.double()(ids.double())  # worked out again, in the new dtype
