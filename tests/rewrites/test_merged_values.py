"""Norms over several values of a stream beside each other, as where patches are merged: another basis passes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.anatomy import anatomy_of, llm_compressor
from normconvert.rewrites.planning import plan_model
from normconvert.rewrites.registry import REWRITES
from normconvert.tracing.graph import trace
from tests.support.basis import check_basis
from tests.support.equivalence import Outcome

D = 12
X = torch.linspace(-1, 1, 2 * 8 * 5, dtype=torch.float64).sin().reshape(2, 8, 5)


class ByHand(nn.Module):
    """RMSNorm of any width, written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))


class Merged(nn.Module):
    """Tokens of a residual stream, four and four beside each other, behind one norm."""

    def __init__(self, norm: Any = nn.LayerNorm, joined: str = "view", bias: bool = True) -> None:
        super().__init__()
        self.joined = joined
        self.write, self.first, self.inner = nn.Linear(5, D), norm(D), nn.Linear(D, D)
        self.merge, self.read = norm(4 * D), nn.Linear(4 * D, 6, bias=bias)

    def together(self, x: Tensor) -> Tensor:
        if self.joined == "view":
            return x.reshape(x.shape[0], 2, 4 * D)
        if self.joined == "cat":  # every second one, as Swin does
            return torch.cat([x[:, at::4] for at in (2, 0, 3, 1)], dim=-1)
        # The tokens within the channels of each other.
        return x.reshape(x.shape[0], 2, 4, D).transpose(-1, -2).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        found: Tensor = self.read(self.merge(self.together(x + self.inner(self.first(x)))))
        return found


class Uneven(Merged):
    """Beside the stream's values stands another one."""

    def together(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2], x[:, 1::2], x[:, ::2], x[:, 1::2].square()], dim=-1)


class TwoKinds(nn.Module):
    """Heads that have a norm each, and one over all of them, of what one map gives."""

    def __init__(self, all_first: bool = False) -> None:
        super().__init__()
        self.all_first = all_first
        self.write, self.each, self.all = nn.Linear(5, 4 * D), nn.LayerNorm(D), nn.LayerNorm(4 * D)
        self.read, self.inner = nn.Linear(D, 3), nn.Linear(4 * D, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.write(x)
        first = self.all(x) if self.all_first else None
        each = self.read(self.each(x.unflatten(-1, (4, D))))
        return each, self.inner(self.all(x) if first is None else first)


def outcome_of(kind: type[nn.Module], method: str, options: Options | None = None, **changes: Any) -> Outcome:
    options = options or (Options(power="3") if method == "scale" else Options())
    found = check_basis(lambda: kind(**changes), [{"x": X}, {"x": X.flip(1)}], method, options)
    assert found.plan is not None
    assert not found.problems
    return found


@pytest.mark.parametrize("method", ["rotate", "scale"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, partial(nn.RMSNorm, eps=1e-5), ByHand])
@pytest.mark.parametrize("joined", ["view", "cat", "within"])
def test_a_norm_over_several_values_of_a_stream_is_one_of_it(method: str, norm: Any, joined: str) -> None:
    found = outcome_of(Merged, method, norm=norm, joined=joined)
    assert found.plan is not None
    assert {verdict.path for verdict in found.plan.converted} == {"first", "merge"}
    if method == "rotate":  # each of the four in the basis of the stream
        rows = found.plan.tensors["read.weight"]
        assert {row["outer"] * row["inner"] for row in rows if row["op"] == "rotate"} == {4}


def test_a_bias_that_stays_in_the_norm_is_rotated_value_by_value() -> None:
    found = outcome_of(Merged, "rotate", bias=False)
    assert found.plan is not None
    assert not found.plan.kept
    assert [row["op"] for row in found.plan.tensors["merge.bias"]] == ["divide", "rotate"]


def planned(kind: type[nn.Module], method: str, **changes: Any) -> Plan:
    graph = trace(kind(**changes).to("meta").eval(), {"x": torch.zeros(2, 8, 5, device="meta")})
    return REWRITES[method].planner(graph, Options(power="3"))


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
def test_the_mean_of_each_value_is_seen_by_a_norm_over_several(method: str) -> None:
    plan = planned(Merged, method)
    assert not plan.converted
    assert "norm-axes" in {verdict.code for verdict in plan.kept}


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_what_stands_beside_values_of_another_kind_stays(method: str) -> None:
    assert not planned(Uneven, method).converted


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_a_norm_does_not_read_channels_of_two_kinds(method: str) -> None:
    # Those of each head, if the model looks at them first.
    found = outcome_of(TwoKinds, method)
    assert found.plan is not None
    assert {verdict.path for verdict in found.plan.converted} == {"each", "all"}
    plan = planned(TwoKinds, method, all_first=True)
    assert not plan.converted
    assert "as channels of two kinds." in plan.kept[0].reason  # and nothing else reads it


class TwoRanks(nn.Module):
    """One norm, called with values of one stream and with the same in rows."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(5, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.write(x)
        return self.read(self.norm(x)), self.read(self.norm(x.unflatten(1, (2, 4))))


def test_a_norm_of_values_of_two_ranks_is_rotated() -> None:
    found = outcome_of(TwoRanks, "rotate")
    assert found.plan is not None
    assert not found.plan.kept


@pytest.mark.parametrize(("joined", "outer"), [("view", 4), ("within", 1)])
def test_the_anatomy_says_where_the_channels_of_merged_values_are(joined: str, outer: int) -> None:
    model = Merged(partial(nn.RMSNorm, eps=1e-5), joined).to("meta").eval()
    anatomy = anatomy_of(trace(model, {"x": torch.zeros(2, 8, 5, device="meta")}))
    assert [stream["merged"] for stream in anatomy["streams"]] == [{"merge": {"outer": outer, "inner": 4 // outer}}]
    mapping = llm_compressor(anatomy)
    assert mapping["r1"] == []
    assert "`merge` reads several of its values side by side" in mapping["left_out"].values()


def test_the_norms_that_merge_patches_no_longer_keep_a_stage_of_swin() -> None:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 1, 1], "num_heads": [1, 2, 2]}
    config = hf.SwinConfig(**sizes, window_size=4)
    with torch.device("meta"):
        model = hf.SwinForImageClassification(config).eval()
    plan = plan_model(model, Options(), "rotate")
    # The first stage begins with the output of a norm.
    assert {v.path.removeprefix("swin.encoder.layers.") for v in plan.converted} == {
        *("1.blocks.0.layernorm_before", "1.blocks.0.layernorm_after", "1.downsample.norm"),
        *("2.blocks.0.layernorm_before", "2.blocks.0.layernorm_after"),
    } | {"swin.layernorm"}
    assert {v.code for v in plan.kept} == {"post-norm", "branch"}
