"""fuse-bn with merged branches: parallel convolutions become one, and those that do not fit each other stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from tests.support.fused_networks import Chain, bn, fused


class Rep(nn.Module):
    """Parallel branches that are added, and an activation."""

    def __init__(self, *branches: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.branches, self.act, self.last = nn.ModuleList(branches), nn.ReLU(), last

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        if self.last is not None:
            total = self.last(total)
        return self.act(total)


def _wide(kernel: int, **options: Any) -> nn.Module:
    options = {"padding": kernel // 2, "bias": False, **options}
    return Chain(nn.Conv2d(6, 6, kernel, **options), bn(6))


MERGED: dict[str, Callable[[], nn.Module]] = {
    "three convolutions and a skip with a norm": lambda: Rep(_wide(3), _wide(1, bias=True), _wide(5), bn(6)),
    "a plain skip": lambda: Rep(_wide(3), nn.Identity(), last=bn(6)),
    "depthwise": lambda: Rep(_wide(7, groups=6), _wide(3, groups=6), bn(6)),
    "groups": lambda: Rep(_wide(3, groups=2), _wide(1, groups=2), bn(6)),
    "strides": lambda: Rep(_wide(3, stride=2), _wide(1, stride=2)),
}


@pytest.mark.parametrize("name", MERGED)
def test_parallel_branches_become_one_convolution(name: str) -> None:
    plan, edited = fused(lambda: Chain(nn.Conv2d(6, 6, 1), MERGED[name](), nn.Conv2d(6, 4, 1)), merge=True)
    assert {v.code for v in plan.verdicts} == {"merged"}
    assert [type(m).__name__ for m in edited.get_submodule("1").children()] == ["Conv2d", "ReLU"]


NOT_MERGED: dict[str, Callable[[], nn.Module]] = {
    "other groups": lambda: Rep(_wide(3), _wide(3, groups=2)),
    "other strides at one size": lambda: Rep(_wide(1, padding=0), Chain(_wide(3), nn.ReLU())),
    "dilation": lambda: Rep(_wide(3, dilation=2, padding=2), _wide(1)),
    "a second convolution": lambda: Rep(Chain(_wide(3), nn.Conv2d(6, 6, 1)), nn.Conv2d(6, 6, 1)),
    "kernels beside each other": lambda: Rep(
        Chain(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(6, 6, 2), bn(6)), Chain(nn.Conv2d(6, 6, 1), bn(6))
    ),
}


@pytest.mark.parametrize("name", NOT_MERGED)
def test_branches_that_do_not_fit_each_other_are_fused_one_by_one(name: str) -> None:
    plan, _ = fused(lambda: Chain(nn.Conv2d(6, 6, 1), NOT_MERGED[name](), nn.Conv2d(6, 4, 1)), merge=True)
    assert "merged" not in {v.code for v in plan.verdicts}
