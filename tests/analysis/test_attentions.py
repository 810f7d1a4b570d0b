"""Which attention could be linear: read from the graph of a small network each, with the reason in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.analysis.attention_costs import crossing, gain, linear_cost, softmax_cost
from normconvert.analysis.attentions import Attention, find_attentions
from normconvert.tracing.graph import trace

B, D, HEADS, H, W = 2, 8, 2, 4, 6
Call = Callable[..., Tensor]


def sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **more)


class Attend(nn.Module):
    """Attention over (batch, tokens, D), by ``call``; ``other`` makes what keys and values are made of."""

    def __init__(self, call: Call = sdpa, other: Call | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(HEADS, 1, 1))
        self.call, self.other = call, other

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        other = x if self.other is None else self.other(self, x)
        y = self.call(self, heads(self.q(x)), heads(self.k(other)), heads(self.v(other)))
        return y.transpose(1, 2).flatten(2)


class Network(nn.Module):
    """Patches of an image, ``before`` on (batch, channels, rows, columns) -> tokens, then attention."""

    def __init__(self, before: Call, attend: Attend) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, D, 2, 2)
        self.cls, self.registers = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(1, 3, D))
        self.positions = nn.Parameter(torch.zeros(1, H * W, D))
        self.norm, self.attn, self.before = nn.LayerNorm(D), attend, before

    def forward(self, image: Tensor) -> Tensor:
        x = self.before(self, self.patch(image))
        return x + self.attn(self.norm(x))


def rows(m: Any, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def found_in(before: Call = rows, attend: Attend | None = None) -> Attention:
    network = Network(before, attend or Attend()).to("meta")
    (found,) = find_attentions(trace(network, {"image": torch.zeros(B, 3, 2 * H, 2 * W, device="meta")}))
    assert found.path == "attn"
    return found


def windows(m: Any, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 3, 3, D)
    return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, D)


LAYOUTS: dict[str, tuple[Call, tuple[int, int], int]] = {
    "rows": (rows, (H, W), 0),
    "position embedding and dropout": (lambda m, x: F.dropout(rows(m, x) + m.positions, 0.1, False), (H, W), 0),
    "class token": (lambda m, x: torch.cat([m.cls.expand(B, -1, -1), rows(m, x)], 1), (H, W), 1),
    "class token, then registers before it": (
        lambda m, x: torch.cat([m.registers.expand(B, -1, -1), torch.cat([m.cls.expand(B, -1, -1), rows(m, x)], 1)], 1),
        (H, W),
        4,
    ),
    "registers taken away": (
        lambda m, x: torch.cat([m.registers.expand(B, -1, -1), rows(m, x)], 1)[:, 2:],
        (H, W),
        1,
    ),
    "windows": (windows, (2, 3), 0),
    "flattened and back": (lambda m, x: rows(m, rows(m, x).transpose(1, 2).reshape(B, D, H, W).relu()), (H, W), 0),
    "activation": (lambda m, x: F.gelu(rows(m, x)), (H, W), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_grid_is_read_from_the_graph(layout: str) -> None:
    before, grid, prefix = LAYOUTS[layout]
    tokens = prefix + grid[0] * grid[1]
    assert found_in(before) == Attention("attn", HEADS, D // HEADS, tokens, grid, prefix)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.5


REFUSED: dict[str, tuple[Call, Attend, str]] = {
    "causal": (rows, Attend(lambda m, *qkv: sdpa(m, *qkv, is_causal=True)), "causal"),
    "causal mask": (
        rows,
        Attend(lambda m, *qkv: sdpa(m, *qkv, attn_mask=qkv[0].new_ones(H * W, H * W, dtype=torch.bool).tril())),
        "causal",
    ),
    "learnt bias": (rows, Attend(lambda m, *qkv: sdpa(m, *qkv, attn_mask=m.bias)), "a mask or a bias"),
    "mask of constants": (
        rows,
        Attend(lambda m, *qkv: sdpa(m, *qkv, attn_mask=torch.arange(H * W, device="meta")[None] > 1)),
        "a mask or a bias",
    ),
    "dropout": (rows, Attend(lambda m, *qkv: sdpa(m, *qkv, dropout_p=0.1)), "drops out weights"),
    "by hand": (rows, Attend(lambda m, q, k, v: (scores(q, k) + m.bias).softmax(-1) @ v), "written by hand"),
    "cross-attention": (rows, Attend(other=lambda m, x: x[:, ::2]), "different tokens"),
    "keys of other tokens": (rows, Attend(other=lambda m, x: x.flip(1)), "not seen to be a grid"),
    "columns first": (lambda m, x: rows(m, x.transpose(2, 3)), Attend(), "not seen to be a grid"),
    "tokens behind": (
        lambda m, x: torch.cat([rows(m, x), m.cls.expand(B, -1, -1)], 1),
        Attend(),
        "not seen to be a grid",
    ),
    "some tokens": (lambda m, x: rows(m, x)[:, : H * W - 2], Attend(), "not seen to be a grid"),
    "some tokens of the grid gone": (lambda m, x: rows(m, x)[:, 1:], Attend(), "not seen to be a grid"),
    "shuffled": (lambda m, x: rows(m, x)[:, torch.arange(H * W).flip(0)], Attend(), "not seen to be a grid"),
    "rolled": (lambda m, x: rows(m, x).roll(1, 1), Attend(), "not seen to be a grid"),
    "like an image": (
        lambda m, x: m.positions.expand_as(rows(m, x)).type_as(rows(m, x)),
        Attend(),
        "not seen to be a grid",
    ),
    "no image": (lambda m, x: m.positions.expand(B, -1, -1), Attend(), "not seen to be a grid"),
    "two heads' channels apart": (
        rows,
        Attend(lambda m, q, k, v: sdpa(m, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, HEADS))),
        "heads are no dimension",
    ),
    "other values": (
        rows,
        Attend(lambda m, q, k, v: sdpa(m, q, k, v.repeat(1, 1, 1, 2))[..., : D // HEADS]),
        "differ in shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_with_the_reason(case: str) -> None:
    before, attend, reason = REFUSED[case]
    assert reason in found_in(before, attend).obstacle


def test_a_mask_of_constants_that_hides_nothing_is_none() -> None:
    def call(m: Any, *qkv: Tensor) -> Tensor:
        mask = torch.arange(H * W, device=qkv[0].device)[None] >= 0
        return sdpa(m, *qkv, attn_mask=mask.expand(B, 1, H * W, H * W))

    assert found_in(attend=Attend(call)).grid == (H, W)


def test_keys_of_another_image_are_other_tokens() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, D, 2, 2), nn.Conv2d(3, D, 2, 2)
            self.attn = Attend(other=lambda m, x: rows(m, self.other))

        def forward(self, image: Tensor) -> Tensor:
            self.other = self.b(image)
            y: Tensor = self.attn(rows(self, self.a(image)))
            return y

    (found,) = find_attentions(trace(Two().to("meta"), {"image": torch.zeros(B, 3, 2 * H, 2 * W, device="meta")}))
    assert "not the same tokens" in found.obstacle


@pytest.mark.parametrize(("heads", "size"), [(3, 64), (6, 64), (4, 16), (12, 64)])
def test_the_crossing_is_where_both_cost_the_same(heads: int, size: int) -> None:
    tokens = crossing(heads, size)
    assert gain(heads, tokens - 1, size) < 1 <= gain(heads, tokens, size)
    # Measured by tools/benchmarks/attention.py for these: 204 to 295
    assert 150 < tokens < 350


def test_costs_grow_as_they_should() -> None:
    for cost, power in ((softmax_cost, 4), (linear_cost, 2)):
        one, two = (cost(3, tokens, 64).operations for tokens in (1000, 2000))
        assert two == power * one
    assert linear_cost(3, 1000, 64, batch=8).bytes == 8 * linear_cost(3, 1000, 64).bytes
    assert gain(3, 196, 64) < 1 < gain(3, 784, 64)
