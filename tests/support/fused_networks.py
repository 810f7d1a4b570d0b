"""Networks of modules and functions with affine norms in them, and their fusing, checked in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb

IMAGE = (2, 6, 9, 8)
BN_LIKE = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


class Chain(nn.Sequential):
    """Modules and functions one after the other."""

    def __init__(self, *steps: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__(*(s if isinstance(s, nn.Module) else Call(s) for s in steps))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branches(nn.Module):
    """Several branches on one input, and what joins them."""

    def __init__(self, join: Callable[[Sequence[Tensor]], Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join([branch(x) for branch in self.branches])


def fused(make: Callable[[], nn.Module], shape: tuple[int, ...] = IMAGE, merge: bool = False) -> tuple[Plan, nn.Module]:
    """The plan of a network and the network with the plan applied, which computes the same in float64."""
    torch.manual_seed(0)
    model = perturb(make().double().eval(), seed=1)
    with_signs(model)
    with torch.device("meta"):
        skeleton = make().double().eval()
    options = Options(merge_branches=merge)
    plan = plan_model(skeleton, options, "fuse-bn", lambda m: trace(m, _named(m, torch.empty(shape).double())))
    edited = algebra_model(model, plan)
    for size in ((0, 0), (3, 2)):  # another size, where the network takes it
        x = torch.randn(shape[0] + 1, *shape[1 : max(2, len(shape) - 2)], *(n + size[0] for n in shape[2:])).double()
        try:
            with torch.no_grad():
                expected = model(x)
        except RuntimeError:
            continue
        with torch.no_grad():
            found = edited(x)
        assert float((found - expected).norm() / expected.norm()) <= 1e-10
    left = [n for n, m in edited.named_modules() if isinstance(m, BN_LIKE)]
    assert set(left) == {v.path for v in plan.kept}, "every norm that was fused is gone, and no other"
    return plan, edited


def with_signs(model: nn.Module) -> None:
    """Give norms scales of every kind: negative, zero, and next to nothing, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BN_LIKE) and isinstance(module.weight, Tensor):
                module.weight[::3] *= -1
                module.weight[1:2] = 0.0
                module.weight[4:5] *= 1e-9


def _named(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    import inspect

    name = next(iter(inspect.signature(model.forward).parameters))
    return {name: x.to("meta")}


def bn(channels: int, **options: Any) -> nn.Module:
    return nn.BatchNorm2d(channels, **options)
