"""fuse-bn: where an affine norm goes, and where it must stay. Perturbed weights and statistics, float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from normconvert.rewrites.planning import plan_model
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.fused_networks import Branches, Chain, bn, fused
from tests.support.perturb import perturb


class Bare(nn.Module):
    """A product with a matrix that is no module's weight, so that nothing can be given a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) @ self.matrix).movedim(-1, 1)


class Nested(nn.Module):
    """Norms of a norm, and what they read: one affine map of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bn(6), bn(6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.second(self.first(x) * 0.5) - x) / 3.0
        return result


COMPLETE: dict[str, Callable[[], nn.Module]] = {
    "conv without bias": lambda: Chain(nn.Conv2d(6, 8, 3, padding=1, bias=False), bn(8), nn.ReLU()),
    "conv with bias, own eps": lambda: Chain(nn.Conv2d(6, 8, 3), bn(8, eps=0.1), nn.ReLU()),
    "no affine": lambda: Chain(nn.Conv2d(6, 8, 3), bn(8, affine=False)),
    "groups": lambda: Chain(nn.Conv2d(6, 6, 3, groups=6, bias=False), bn(6), nn.Conv2d(6, 9, 1, groups=3), bn(9)),
    "transposed": lambda: Chain(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, bias=False), bn(8)),
    "transposed, groups": lambda: Chain(nn.ConvTranspose2d(6, 9, 3, groups=3, bias=False), bn(9)),
    "frozen": lambda: Chain(nn.Conv2d(6, 8, 3, bias=False), FrozenBatchNorm2d(8), nn.ReLU()),
    "through an average pool": lambda: Chain(nn.Conv2d(6, 8, 3), nn.AvgPool2d(2), bn(8)),
    "through flatten and transpose": lambda: Chain(
        nn.Conv2d(6, 8, 3), lambda x: x.flatten(2).transpose(1, 2), lambda x: x.flatten(0, 1), nn.BatchNorm1d(8)
    ),
    "behind: flatten into a linear": lambda: Chain(
        nn.ReLU(), nn.AdaptiveAvgPool2d((2, 1)), bn(6), nn.Flatten(), nn.Linear(12, 5, bias=False)
    ),
    "behind: pool into a linear": lambda: Chain(
        nn.ReLU(), bn(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 5)
    ),
    "behind: conv without padding": lambda: Chain(nn.ReLU(), bn(6), nn.Conv2d(6, 8, 3, bias=False)),
    "behind: grouped conv": lambda: Chain(nn.ReLU(), bn(6), nn.Conv2d(6, 9, 1, groups=3, bias=False)),
    "behind: transposed conv of one tap": lambda: Chain(nn.ReLU(), bn(6), nn.ConvTranspose2d(6, 8, 1, bias=False)),
    "behind: grouped transposed conv": lambda: Chain(
        nn.ReLU(), bn(6), nn.ConvTranspose2d(6, 8, 1, groups=2, bias=False), bn(8), nn.ReLU()
    ),
    "both sides of one conv": lambda: Chain(nn.ReLU(), bn(6), nn.Conv2d(6, 8, 1, bias=False), bn(8), nn.ReLU()),
    "two in a row": lambda: Chain(nn.Conv2d(6, 8, 3, bias=False), bn(8), bn(8), nn.ReLU()),
    "behind: three in a row": lambda: Chain(
        nn.ReLU(), bn(6), bn(6), nn.AvgPool2d(2), FrozenBatchNorm2d(6), nn.Conv2d(6, 8, 3, bias=False)
    ),
    "behind: two in a row, grouped": lambda: Chain(nn.ReLU(), bn(6), bn(6), nn.Conv2d(6, 9, 1, groups=3, bias=False)),
    "behind: two in a row, the second over a concatenation": lambda: Chain(
        nn.ReLU(), Branches(lambda x: torch.cat(list(x), 1), bn(6), nn.Sigmoid(), bn(6)), bn(18), nn.Conv2d(18, 4, 1)
    ),
    "behind: two in a row, the first read elsewhere": lambda: Chain(
        nn.ReLU(),
        bn(6),
        Branches(lambda x: x[0] * x[1], Chain(bn(6), nn.Conv2d(6, 5, 1)), nn.Conv2d(6, 5, 1, bias=False)),
    ),
    "a sum of two convs": lambda: Chain(
        Branches(lambda x: x[0] + x[1], nn.Conv2d(6, 8, 1, bias=False), nn.Conv2d(6, 8, 1)), bn(8), nn.ReLU()
    ),
    "a sum that takes the shift once": lambda: Chain(
        Branches(lambda x: x[0] - x[1], nn.Conv2d(6, 6, 1), Bare()), bn(6), nn.ReLU()
    ),
    "a concatenation before it": lambda: Chain(
        Branches(lambda x: torch.cat(list(x), 1), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 3, 1, bias=False)), bn(8)
    ),
    "a concatenation behind it": lambda: Chain(
        nn.ReLU(), Branches(lambda x: torch.cat(list(x), 1), bn(6), nn.Sigmoid(), bn(6)), nn.Conv2d(18, 4, 1)
    ),
    "several readers": lambda: Chain(
        nn.ReLU(), bn(6), Branches(lambda x: x[0] * x[1], nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1, bias=False))
    ),
    "clipped: ReLU into a conv": lambda: Chain(nn.ReLU(), bn(6), nn.ReLU(), nn.Conv2d(6, 4, 1)),
    "clipped: ReLU in place": lambda: Chain(nn.SiLU(), bn(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1, bias=False)),
    "clipped: into a pool and a linear": lambda: Chain(
        nn.SiLU(), bn(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ),
    "clipped: several readers that pad": lambda: Chain(
        nn.SiLU(),
        bn(6),
        nn.ReLU(),
        Branches(
            lambda x: x[0] * x[1], nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False)
        ),
    ),
    "clipped: a transposed conv": lambda: Chain(nn.SiLU(), bn(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2)),
    "clipped: the norm's own activation, frozen channels between": lambda: Chain(
        nn.SiLU(), BatchNormAct2d(6), FrozenBatchNorm2d(6), nn.Conv2d(6, 4, 3, bias=False)
    ),
    "clipped: dense": lambda: Chain(
        nn.ReLU(),
        Branches(
            lambda x: torch.cat(list(x), 1), nn.Identity(), Chain(bn(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))
        ),
        Branches(lambda x: torch.cat(list(x), 1), nn.Identity(), Chain(bn(10), nn.ReLU(), nn.Conv2d(10, 4, 1))),
        bn(14),
        nn.ReLU(),
        nn.Conv2d(14, 8, 1, bias=False),
        bn(8),
        nn.ReLU(),
    ),
    "residual": lambda: Chain(
        Branches(lambda x: x[0] + x[1], nn.Identity(), Chain(nn.Conv2d(6, 6, 3, padding=1, bias=False), bn(6))),
        nn.ReLU(),
    ),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_every_norm_is_fused(name: str) -> None:
    plan, _ = fused(COMPLETE[name])
    assert plan.verdicts
    assert not plan.kept, [v.reason for v in plan.kept]


def _shared_conv() -> nn.Module:
    conv = nn.Conv2d(6, 6, 1)
    return Chain(conv, bn(6), nn.ReLU(), conv, nn.ReLU())


class Plain(nn.Module):
    """A ReLU that is a line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = bn(6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(F.relu(self.norm(F.relu(x))))
        return result


class Twice(Plain):
    """One ReLU called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(self.relu(self.norm(self.relu(x))))
        return result


def _shared_relu() -> nn.Module:
    relu = nn.ReLU()
    return Chain(nn.SiLU(), bn(6), relu, nn.Conv2d(6, 6, 1), relu)


def _shared_norm() -> nn.Module:
    norm = bn(6)
    return Chain(nn.Conv2d(6, 6, 1), norm, nn.ReLU(), norm, nn.ReLU())


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).view_as(self.weight)
        return F.conv2d(x, w, self.bias)


class Deaf(nn.Conv2d):
    """A convolution that would not apply a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


KEPT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "behind ReLU, before SiLU": (lambda: Chain(nn.ReLU(), bn(6), nn.SiLU(), nn.Conv2d(6, 4, 1)), "unknown-op", "silu"),
    "behind ReLU, before ReLU6": (
        lambda: Chain(nn.ReLU(), bn(6), nn.ReLU6(), nn.Conv2d(6, 4, 1)),
        "unknown-op",
        "hardtanh",
    ),
    "behind ReLU, before ReLU and a max pool": (
        lambda: Chain(nn.ReLU(), bn(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)),
        "unknown-op",
        "relu",
    ),
    "behind ReLU, before a ReLU that is returned": (lambda: Chain(nn.ReLU(), bn(6), nn.ReLU()), "unknown-op", "relu"),
    "behind ReLU, before a ReLU that is no module": (lambda: Plain(), "unknown-op", "relu"),
    "behind ReLU, before ReLU and more in one module": (
        lambda: Chain(nn.ReLU(), bn(6), lambda x: F.relu(x) + 1.0, nn.Conv2d(6, 4, 1)),
        "unknown-op",
        "relu",
    ),
    "behind ReLU, before the same ReLU": (lambda: Twice(), "unknown-op", "relu"),
    "behind ReLU, before a shared ReLU": (_shared_relu, "unknown-op", "relu"),
    "behind ReLU, before ReLU, read by a product": (
        lambda: Chain(
            nn.ReLU(),
            bn(6),
            nn.ReLU(),
            Branches(lambda x: x[0] * x[1], nn.Conv2d(6, 6, 1), nn.Identity()),
        ),
        "unknown-op",
        "relu",
    ),
    "read elsewhere": (
        lambda: Chain(nn.Conv2d(6, 6, 1), Branches(lambda x: x[0] * x[1], Chain(bn(6), nn.ReLU()), nn.Identity())),
        "read-elsewhere",
        "reads the same value",
    ),
    "zero padding behind": (lambda: Chain(nn.ReLU(), bn(6), nn.Conv2d(6, 4, 3, padding=1)), "padding", "zeros"),
    "padded pool between": (
        lambda: Chain(nn.Conv2d(6, 6, 1), nn.AvgPool2d(3, padding=1), bn(6), nn.ReLU()),
        "not-constant",
        "constant",
    ),
    "zero padding between": (
        lambda: Chain(nn.Conv2d(6, 6, 1), lambda x: F.pad(x, (1, 1)), bn(6), nn.ReLU()),
        "not-constant",
        "constant",
    ),
    "transposed conv behind": (
        lambda: Chain(nn.ReLU(), bn(6), nn.ConvTranspose2d(6, 4, 2, stride=2)),
        "padding",
        "taps",
    ),
    "max pool between": (
        lambda: Chain(nn.Conv2d(6, 6, 1), nn.MaxPool2d(2), bn(6), nn.ReLU()),
        "unknown-op",
        "max_pool",
    ),
    "no running statistics": (
        lambda: Chain(nn.Conv2d(6, 6, 1), bn(6, track_running_stats=False)),
        "batch-statistics",
        "statistics",
    ),
    "the conv is shared": (_shared_conv, "tied", "tied"),
    "the norm is shared": (_shared_norm, "unknown-op", "relu"),
    "a computed weight": (lambda: Chain(Standardised(6, 6, 1), bn(6), nn.ReLU()), "computed-weight", "computed"),
    "no bias could be added": (lambda: Chain(Deaf(6, 6, 1, bias=False), bn(6), nn.ReLU()), "unproved", "bias"),
    "no bias can be added": (
        lambda: Chain(Branches(lambda x: torch.cat(list(x), 1), nn.Conv2d(6, 6, 1), Bare()), bn(12), nn.ReLU()),
        "no-bias",
        "no bias to take the shift",
    ),
    "returned": (lambda: Chain(nn.ReLU(), bn(6)), "returned", "returns"),
    "one number in many places, before what is done in place": (
        lambda: Chain(
            nn.Conv2d(6, 6, 1), lambda x: x.mean((2, 3), keepdim=True).expand_as(x), bn(6), nn.ReLU(inplace=True)
        ),
        "input",
        "repeats one number",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_move_is_kept_with_the_reason(name: str) -> None:
    make, code, words = KEPT[name]
    plan, _ = fused(make)
    assert not plan.converted
    assert {v.code for v in plan.kept} == {code}, [v.reason for v in plan.kept]
    assert any(words in v.reason for v in plan.kept), [v.reason for v in plan.kept]


def test_a_norm_keeps_its_activation() -> None:
    plan, edited = fused(lambda: Chain(nn.Conv2d(6, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU)))
    assert len(plan.converted) == 1
    assert [type(m).__name__ for m in edited.get_submodule("1").children()] == ["SiLU"]


def test_a_prelu_in_a_norm_keeps_its_weight_and_name() -> None:
    def make() -> nn.Module:
        return Chain(nn.Conv2d(6, 8, 3), BatchNormAct2d(8, act_layer=nn.PReLU))

    _, edited = fused(make)
    assert "1.act.weight" in edited.state_dict()


def test_repbn_is_one_affine_norm() -> None:
    class RepBN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.eta = nn.BatchNorm1d(8), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.eta * x

    def make() -> nn.Module:
        return Chain(nn.ReLU(), RepBN(), nn.Linear(8, 5, bias=False), nn.ReLU())

    torch.manual_seed(0)
    model = perturb(make().double().eval(), seed=1)
    with torch.device("meta"):
        skeleton = make().double().eval()
    x = torch.randn(5, 8).double()
    plan = plan_model(skeleton, method="fuse-bn", tracer=lambda m: trace(m, {"input": x.to("meta")}))
    assert [(v.path, v.kind, v.converted) for v in plan.verdicts] == [("1", "RepBN", True)]
    with torch.no_grad():
        assert torch.allclose(algebra_model(model, plan)(x), model(x), rtol=1e-12, atol=1e-12)


def test_norms_inside_a_norm_are_one_affine_norm() -> None:
    plan, _ = fused(lambda: Chain(nn.Conv2d(6, 6, 1), Nested(), nn.ReLU()))
    assert [(v.path, v.kind, v.code) for v in plan.verdicts] == [("1", "Nested", "fused-before")]


def test_sync_batch_norm_is_one() -> None:
    plan, _ = fused(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Chain(nn.Conv2d(6, 8, 3), bn(8))))
    assert [v.kind for v in plan.converted] == ["SyncBatchNorm"]


def test_every_batch_norm_that_is_never_called_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(6, 6, 1), bn(6), bn(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    plan, _ = fused(Unused)
    assert {(v.path, v.code) for v in plan.verdicts} == {("bn", "fused-before"), ("other", "unreached")}
