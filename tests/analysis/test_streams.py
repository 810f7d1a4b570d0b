"""What the analysis must get right, a small network for each: the verdict, its reason in words, the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.network_parts import WRITERS, Op, Size, param
from tests.support.small_models import (
    VOCAB,
    B,
    Build,
    D,
    Model,
    PreNorm,
    T,
    centred,
    converted,
    inserted,
    plan_of,
    verdict,
)


def test_a_plain_network_converts_by_editing_its_writers() -> None:
    plan = plan_of(lambda: Model(PreNorm(), PreNorm()))
    assert converted(plan) == {"blocks.0.norm", "blocks.1.norm", "norm"}
    writers = {f"blocks.{i}.branch.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert centred(plan) == writers | {"embed.weight"}
    assert not inserted(plan)


# ---------------------------------------------------------------------------------------------------------------------
# Tied weights


def test_a_tied_table_is_left_alone_and_the_embeddings_output_centred() -> None:
    plan = plan_of(lambda: Model(PreNorm(), tied=True))
    assert converted(plan) == {"blocks.0.norm", "norm"}
    assert "embed.weight" not in plan.tensors
    assert "head.weight" not in plan.tensors
    assert inserted(plan) == [("embed", "output")]


def test_untying_centres_a_copy_and_leaves_the_head_its_table() -> None:
    plan = plan_of(lambda: Model(PreNorm(), tied=True), tied="untie")
    assert converted(plan) == {"blocks.0.norm", "norm"}
    assert not inserted(plan)
    assert [e["op"] for e in plan.tensors["embed.weight"]] == ["center"]
    assert plan.tensors["head.weight"] == [{"op": "copy", "from": "embed.weight"}]
    assert plan.config == {"tie_word_embeddings": False}
    assert any("no longer tied" in note for note in plan.notes)


def test_a_norm_of_the_logits_of_a_tied_head_is_no_reason_to_centre_the_table() -> None:
    def build() -> nn.Module:
        model = Model(tied=True)
        model.head = nn.Sequential(model.head, nn.LayerNorm(VOCAB))
        return model

    for tied in ("center", "untie"):
        assert "norm" in converted(plan_of(build, tied=tied, min_gain=1))


def test_one_table_for_two_streams_is_centred_once() -> None:
    def forward(m: Any, ids: Tensor) -> Tensor:
        y: Tensor = m.a(m.embed(ids)) + m.b(m.embed(ids.flip(1)))
        return y

    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(VOCAB, D), nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, ids: Tensor) -> Tensor:
            return forward(self, ids)

    plan = plan_of(TwoStreams)
    assert converted(plan) == {"a", "b"}
    assert plan.tensors == {"embed.weight": [{"op": "center", "axis": 1}]}


# ---------------------------------------------------------------------------------------------------------------------
# Layer scale


def _scaled(shape: tuple[int, ...] = (D,), shared: bool = False, spy: bool = False) -> Build:
    def scaled(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        return m.gamma * y + (F.gelu(m.gamma) if spy else 0)

    def build() -> nn.Module:
        first = Op(scaled, linear=nn.Linear(D, D), gamma=param(*shape))
        second = Op(scaled, linear=nn.Linear(D, D), gamma=first.gamma if shared else param(*shape))
        return Model(PreNorm(first), PreNorm(second))

    return build


@pytest.mark.parametrize("shape", [(D,), (1, 1, D)])
def test_a_layer_scale_folds_into_the_linear_before_it(shape: tuple[int, ...]) -> None:
    plan = plan_of(_scaled(shape))
    assert len(converted(plan)) == 3
    assert not inserted(plan)
    assert [e["op"] for e in plan.tensors["blocks.0.branch.linear.weight"]] == ["scale", "center"]
    assert [e["op"] for e in plan.tensors["blocks.0.branch.linear.bias"]] == ["scale", "center"]
    assert plan.tensors["blocks.0.branch.gamma"] == [{"op": "fill", "value": 1.0}]


@pytest.mark.parametrize("build", [_scaled(shared=True), _scaled(spy=True)], ids=["shared", "read elsewhere"])
def test_a_layer_scale_with_other_readers_is_not_folded(build: Build) -> None:
    plan = plan_of(build)
    assert not any(e["op"] == "fill" for edits in plan.tensors.values() for e in edits)


def test_what_a_scale_that_cannot_be_folded_writes_is_named() -> None:
    plan = plan_of(lambda: Model(PreNorm(Op(lambda m, x: m.g.tanh() * m.l(x), g=param(D), l=nn.Linear(D, D)))))
    assert converted(plan) == {"blocks.0.norm"}
    assert verdict(plan, "norm").code == "not-mean-free"
    assert "blocks.0.branch" in verdict(plan, "norm").reason


# ---------------------------------------------------------------------------------------------------------------------
# Sharing


def test_parallel_blocks_and_one_norm_with_many_readers() -> None:
    def branch(m: Any, h: Tensor) -> Tensor:
        y: Tensor = m.q(h).softmax(-1) * m.k(h).mean(-1, keepdim=True)
        return m.v(h + y) + m.w(F.gelu(h))

    plan = plan_of(lambda: Model(PreNorm(Op(branch, **{n: nn.Linear(D, D) for n in "qkvw"}))))
    assert converted(plan) == {"blocks.0.norm", "norm"}
    assert centred(plan) >= {"blocks.0.branch.v.weight", "blocks.0.branch.w.weight"}
    assert not {"blocks.0.branch.q.weight", "blocks.0.branch.k.weight"} & set(plan.tensors)


def test_a_layer_that_is_used_twice_is_edited_once() -> None:
    def build() -> nn.Module:
        block = PreNorm()
        return Model(block, block, PreNorm(block.branch))

    plan = plan_of(build)
    assert plan.tensors["blocks.0.branch.weight"] == [{"op": "center", "axis": 0}]
    assert converted(plan) == {"blocks.0.norm", "blocks.2.norm", "norm"}


def test_a_norm_that_once_reads_something_else_stays() -> None:
    """Both calls of a module have a vote, whatever the name it is called by."""

    def build() -> nn.Module:
        first, second = PreNorm(Op(lambda m, x: F.gelu(m.l(x)), l=nn.Linear(D, D))), PreNorm()
        second.norm = first.norm
        return Model(first, second)

    assert converted(plan_of(build)) == set()


def test_a_parameter_with_another_reader_is_not_edited() -> None:
    plan = plan_of(lambda: Model(PreNorm(Op(lambda m, x: m.l(x * m.l.bias), l=nn.Linear(D, D)))), min_gain=9)
    assert "blocks.0.branch.l.bias" not in plan.tensors
    assert "bias" in verdict(plan, "norm").reason


# ---------------------------------------------------------------------------------------------------------------------
# Post-LN and what returns the stream


def test_post_norm_is_refused_with_that_reason() -> None:
    plan = plan_of(lambda: Model(PreNorm(post=True), PreNorm(post=True)), min_gain=1)
    assert "blocks.0.norm" not in {m["path"] for m in plan.modules if m["op"] == "center"}
    assert {"blocks.1.norm"} & converted(plan) == set()
    last = verdict(plan, "blocks.1.norm")
    assert last.code == "post-norm"
    assert last.reason == "`blocks.1.branch` reads the normalised stream directly (Post-LN)."


def test_mix_ln_converts_its_pre_norm_part() -> None:
    plan = plan_of(lambda: Model(PreNorm(post=True), *(PreNorm() for _ in range(3))))
    assert converted(plan) == {"blocks.1.norm", "blocks.2.norm", "blocks.3.norm", "norm"}
    assert inserted(plan) == [("blocks.0", "output")] or inserted(plan) == [("blocks.0.norm", "output")]
    assert "`blocks.0.branch` reads it directly" in verdict(plan, "blocks.0.norm").reason


def test_a_returned_stream_is_refused_unless_its_mean_may_change() -> None:
    def build() -> nn.Module:
        return Model(PreNorm(), returned=True)

    plan = plan_of(build)
    assert not plan.converted
    assert {v.code for v in plan.verdicts} == {"returned"}
    assert "`hidden`" in plan.verdicts[0].reason
    assert "--allow-shifted-outputs" in plan.verdicts[0].reason
    allowed = plan_of(build, allow_shifted_outputs=True)
    assert len(allowed.converted) == 2
    assert "shifted outputs: hidden" in allowed.notes


class Gram(Model):
    """Its hidden states are returned as how alike their channels are."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        found = super().forward(ids)
        hidden = found.pop("hidden")
        return {**found, "alike": hidden.mT @ hidden}


def test_what_is_returned_with_channels_along_two_dimensions_may_not_change() -> None:
    plan = plan_of(lambda: Gram(PreNorm(), returned=True), allow_shifted_outputs=True)
    assert not plan.converted
    assert "returns it as `alike`, with channels along two of its dimensions" in plan.verdicts[0].reason


# ---------------------------------------------------------------------------------------------------------------------
# Opaque writers and leaks


class Pooling(nn.Module):
    """Hiera: the skip of a block is max-pooled, a second half reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.proj, self.norm2, self.mlp = nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.max_pool1d(self.proj(self.norm1(x)).transpose(1, 2), 2).transpose(1, 2)
        y: Tensor = skip + self.mlp(self.norm2(skip))
        return y


def test_max_pooling_in_a_block_keeps_its_second_norm_only() -> None:
    plan = plan_of(lambda: Model(PreNorm(), Pooling(), *(PreNorm() for _ in range(3))))
    assert converted(plan) == {
        "blocks.0.norm",
        "blocks.1.norm1",
        "blocks.2.norm",
        "blocks.3.norm",
        "blocks.4.norm",
        "norm",
    }
    assert inserted(plan) == [("blocks.1", "output")]
    assert "max_pool" in verdict(plan, "blocks.1.norm2").reason


def _mixers() -> nn.Module:
    return Model(*(PreNorm(WRITERS["token_mixer"](Size(B, T, D))) for _ in range(2)))


def test_writers_that_mix_tokens_are_opaque_and_worth_it_for_a_small_gain() -> None:
    assert converted(plan_of(_mixers, min_gain=3)) == {"blocks.0.norm"}
    plan = plan_of(_mixers, min_gain=1)
    assert converted(plan) == {"blocks.0.norm", "blocks.1.norm", "norm"}
    assert len(inserted(plan)) == 2


def test_a_centring_operation_must_win_enough_norms() -> None:
    def build() -> nn.Module:
        model = Model(PreNorm(), PreNorm())
        model.embed = nn.Sequential(nn.Embedding(VOCAB, D), nn.GELU())
        return model

    assert len(plan_of(build, min_gain=3).converted) == 3
    assert not plan_of(build, min_gain=4).converted


def test_an_unknown_operation_is_opaque_as_a_writer() -> None:
    plan = plan_of(lambda: Model(PreNorm(Op(lambda m, x: torch.special.erf(m.l(x)), l=nn.Linear(D, D)))))
    assert converted(plan) == {"blocks.0.norm"}
    assert "erf in `blocks.0.branch`" in verdict(plan, "norm").reason


def test_an_unknown_operation_is_a_leak_as_a_reader() -> None:
    plan = plan_of(lambda: Model(Op(lambda m, x: x + m.l(torch.special.erf(x)), l=nn.Linear(D, D))))
    assert not plan.converted
    assert verdict(plan, "norm").code == "unknown-op"
    assert "erf in `blocks.0` reads it" in verdict(plan, "norm").reason


def test_a_linear_that_reads_the_raw_stream_is_named() -> None:
    plan = plan_of(lambda: Model(Op(lambda m, x: x + m.l(x), l=nn.Linear(D, D))))
    assert verdict(plan, "norm").code == "linear"
    assert "`blocks.0.l` reads it directly" in verdict(plan, "norm").reason


def test_a_stream_used_as_an_attention_mask_is_read() -> None:
    def masked(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        keys = h[:, :1].expand(-1, D, -1) * torch.arange(D, device=x.device)[:, None]
        return x + m.l(F.scaled_dot_product_attention(h, keys, keys, attn_mask=x))

    assert not plan_of(lambda: Model(Op(masked, norm=nn.LayerNorm(D), l=nn.Linear(D, D)))).converted


# ---------------------------------------------------------------------------------------------------------------------
# Writing in place


def _mutates(m: Any, x: Tensor) -> None:
    x += F.gelu(m.p)


def _by_a_module(m: Any, x: Tensor) -> Tensor:
    m.inner(x)
    return x


def _through_an_output(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    y += F.gelu(m.p)
    return x


@pytest.mark.parametrize("how", ["by a module", "through an output"])
def test_what_is_written_in_place_behind_a_module_boundary_is_seen(how: str) -> None:
    def build() -> nn.Module:
        if how == "by a module":
            return Model(Op(_by_a_module, inner=Op(_mutates, p=param(D))))
        return Model(Op(_through_an_output, inner=nn.Sequential(), p=param(D)))

    assert "norm" not in converted(plan_of(build, min_gain=9))


def test_a_residual_added_in_place_converts() -> None:
    def added(m: Any, x: Tensor) -> Tensor:
        x += m.l(m.norm(x))
        return x

    plan = plan_of(lambda: Model(Op(added, norm=nn.LayerNorm(D), l=nn.Linear(D, D))))
    assert converted(plan) == {"blocks.0.norm", "norm"}


# ---------------------------------------------------------------------------------------------------------------------
# Queries and unreached norms


def test_a_value_made_of_parameters_alone_is_centred_for_norms_only() -> None:
    """Learned queries, read by a norm and, raw, by another linear map: the table must stay as it is."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = Op(lambda m, ids: m.p.repeat(ids.shape[0], 1, 1), p=param(1, 3, D))
            self.norm, self.raw = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, ids: Tensor) -> Tensor:
            q = self.q(ids)
            y: Tensor = self.norm(q) + self.raw(q)
            return y

    plan = plan_of(Queries, min_gain=1)
    assert not plan.tensors
    assert inserted(plan) == [("norm", "input")]
    assert not plan_of(Queries, min_gain=2).converted


def test_a_norm_that_no_traced_input_reaches_is_not_converted() -> None:
    class Branching(Model):
        def __init__(self) -> None:
            super().__init__(PreNorm())
            self.extra = nn.LayerNorm(D)

    assert "extra" not in converted(plan_of(Branching))
