"""An operation is known by its overload: one name may be two functions, and only one of them has a rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.analysis.op_table import TABLE
from normconvert.options import Options
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.graph import trace
from normconvert.tracing.operations import name_of
from tests.support.small_models import D, Model, PreNorm, converted, plan_of


class FlooredNorm(nn.Module):
    """A norm by hand whose quotient is rounded down: no LayerNorm, however much it looks like one."""

    def __init__(self, mode: str | None = "floor") -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.mode: Any = mode

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.div(centred, spread, rounding_mode=self.mode) * self.gain + self.bias


def test_a_quotient_that_rounds_is_no_norm() -> None:
    assert "blocks.0.norm" not in converted(plan_of(lambda: Model(block_with(FlooredNorm()))))


def block_with(norm: nn.Module) -> nn.Module:
    block = PreNorm()
    block.norm = norm
    return block


class Divided(nn.Module):
    """x / v with a stored v, rounded down or not."""

    running_var: Tensor

    def __init__(self, mode: str | None, scale_only: bool = False) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.full((8,), 0.3))
        self.weight, self.mode, self.scale_only = nn.Parameter(torch.full((8,), 1.7)), mode, scale_only

    def forward(self, x: Tensor) -> Tensor:
        mode: Any = self.mode
        if self.scale_only:  # the vector itself is rounded, not the values
            return x * torch.div(self.weight, self.running_var, rounding_mode=mode).view(1, 8, 1, 1)
        return torch.div(x, self.running_var.view(1, 8, 1, 1), rounding_mode=mode)


@pytest.mark.parametrize("scale_only", [False, True])
@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_quotient_that_rounds_is_no_affine_norm(mode: str, scale_only: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), Divided(mode, scale_only)).double().eval()

    with torch.device("meta"):
        skeleton = build()
    inputs = {"input": torch.empty(2, 3, 6, 6, dtype=torch.float64)}
    plan = plan_model(skeleton, Options(), "fuse-bn", lambda model: trace(model, inputs))
    assert not plan.converted


def _graph_names(function: Any, *shapes: tuple[int, ...]) -> set[str]:
    class Wrapped(nn.Module):
        def forward(self, **tensors: Tensor) -> Any:
            return function(*tensors.values())

    inputs = {f"x{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    program = torch.export.export(Wrapped(), (), kwargs=inputs)
    return {name_of(node) for node in program.graph.nodes if node.op == "call_function"}


def test_only_the_overloads_that_mean_the_same_share_a_name() -> None:
    assert _graph_names(lambda x, y: torch.div(x, y), (2, 3), (2, 3)) == {"aten.div"}
    assert _graph_names(lambda x, y: torch.div(x, y, rounding_mode="floor"), (2, 3), (2, 3)) == {"aten.div.Tensor_mode"}
    assert "aten.view" not in _graph_names(lambda x: x.view(torch.int32), (2, 3))


@pytest.mark.parametrize("name", sorted(n for n in TABLE if n.startswith("aten.") and n.count(".") == 1))
def test_a_rule_is_of_overloads_without_further_arguments(name: str) -> None:
    """An overload that rounds its result or writes it elsewhere is not what its name alone says."""
    operation = getattr(torch.ops.aten, name.removeprefix("aten."), None)
    for overload in operation.overloads() if operation is not None else ():
        arguments = {argument.name for argument in getattr(operation, overload)._schema.arguments}
        if arguments & {"rounding_mode", "out"}:
            node = torch.fx.Graph().call_function(getattr(operation, overload))
            assert name_of(node) == f"{name}.{overload}"
