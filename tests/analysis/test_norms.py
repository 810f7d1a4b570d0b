"""Norms and linear maps in all spellings: what is one converts or writes, what only looks like one does not."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from tests.support.network_norms import NORMS
from tests.support.network_parts import WRITERS, Op, Size, param
from tests.support.small_models import B, Build, D, Model, PreNorm, T, converted, plan_of, verdict


def test_a_norm_right_after_a_linear_is_a_stream_of_its_own() -> None:
    plan = plan_of(lambda: Model(PreNorm(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)))))
    assert converted(plan) == {"blocks.0.norm", "blocks.0.branch.1"}
    assert verdict(plan, "norm").code == "not-mean-free"
    assert "`blocks.0.branch.1`" in verdict(plan, "norm").reason


def _with_norm(name: str) -> Build:
    def build() -> nn.Module:
        block = PreNorm()
        block.norm = NORMS[name](Size(B, T, D))
        return Model(block)

    return build


@pytest.mark.parametrize("name", ["functional", "weight_plus_one", "no_affine", "no_bias", "moved_axis"])
def test_variants_of_layer_norm_convert(name: str) -> None:
    assert converted(plan_of(_with_norm(name))) == {"blocks.0.norm", "norm"}


@pytest.mark.parametrize("name", [n for n in NORMS if n.startswith("by_hand") and n != "by_hand_image"])
def test_norms_written_by_hand_convert(name: str) -> None:
    assert "blocks.0.norm" in converted(plan_of(_with_norm(name)))


MORE_THAN_A_NORM = """doubled_inside halved_before negated_inside rolled_inside flipped_inside meaned_inside
    masked_inside bias_plus_one weight_alpha gain_after bias_first bias_subtracted bias_alpha eps_alpha weight_flipped
    weight_scaled"""


@pytest.mark.parametrize("name", MORE_THAN_A_NORM.split())
def test_a_module_that_does_more_than_normalise_is_not_replaced(name: str) -> None:
    plan = plan_of(_with_norm(name))
    assert "blocks.0.norm" not in converted(plan)
    assert "norm" in converted(plan)  # it still reads the stream through P only


@pytest.mark.parametrize(
    "name", ["sub_alpha", "uncentred_variance", "centred_half", "rms_norm", "group_norm", "over_both"]
)
def test_what_only_looks_like_a_norm_keeps_all_others(name: str) -> None:
    assert converted(plan_of(_with_norm(name))) == set()


def test_a_norm_inside_a_block_is_read_as_one_and_stays() -> None:
    def build() -> nn.Module:
        branch = Op(lambda m, x: m.l(F.layer_norm(x, (D,), m.gain)), l=nn.Linear(D, D), gain=param(D))
        return Model(Op(lambda m, x: x + m.b(x), b=branch))

    plan = plan_of(build)
    assert converted(plan) == {"norm"}
    assert "not as a module of its own" in plan.kept[0].reason


@pytest.mark.parametrize("unused", ["unused", "twice"])
def test_a_norm_whose_module_holds_more_parameters_stays(unused: str) -> None:
    def build() -> nn.Module:
        norm = Op(lambda m, x: F.layer_norm(x, (D,), m.gain, None if unused == "unused" else m.gain), gain=param(D))
        if unused == "unused":
            norm.b = param(3)
        block = PreNorm()
        block.norm = norm
        return Model(block)

    assert converted(plan_of(build)) == {"norm"}


LINEARS = (
    "matmul matmul_transposed addmm einsum functional conv1 conv3 attention_plain fused_halves fused_view einsum_heads"
)


@pytest.mark.parametrize("name", LINEARS.split())
def test_linear_maps_in_all_spellings_are_writers(name: str) -> None:
    plan = plan_of(lambda: Model(PreNorm(WRITERS[name](Size(B, T, D)))), min_gain=9)
    assert converted(plan) == {"blocks.0.norm", "norm"}
