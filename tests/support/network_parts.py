"""The parts that random networks are made of: tables of small modules, one row a kind.

A part that writes or transforms maps (batch, tokens, width) to the same rank; a feature may give any shape. Parts are
built for a `Size`; one that works for that many tokens only sets ``size.fixed``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Size:
    """What parts are built for.

    ``fixed`` becomes True when a part depends on the number of tokens; ``exact`` when it means something else for
    other sizes (a reshape that is a transposition only of a square), so that a trace says nothing about those.
    """

    batch: int
    tokens: int
    width: int
    vocab: int = 11
    fixed: bool = False
    exact: bool = False

    def fix(self) -> int:
        self.fixed = True
        return self.tokens


class Op(nn.Module):
    """A module whose forward is a function of itself and its inputs, with named parameters and modules."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


Build = Callable[[Size], nn.Module]


def exact(build: Build) -> Build:
    """A part whose meaning depends on the sizes."""

    def marked(s: Size) -> nn.Module:
        s.exact = True
        return build(s)

    return marked


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def linear(size: Size, out: int | None = None, bias: bool = True) -> nn.Linear:
    return nn.Linear(size.width, size.width if out is None else out, bias=bias)


def simple(function: Callable[..., Any]) -> Build:
    """A part without parameters."""
    return lambda s: Op(lambda m, x: function(x))


def with_linear(function: Callable[..., Any], bias: bool = True) -> Build:
    """A part with one linear map ``m.l``."""
    return lambda s: Op(function, l=linear(s, bias=bias))


def with_two(function: Callable[..., Any]) -> Build:
    return lambda s: Op(function, l=linear(s), k=linear(s))


def grid(x: Tensor) -> tuple[int, int]:
    """Height and width of the tokens as an image."""
    h = 2 if x.shape[1] % 2 == 0 else 1
    return h, x.shape[1] // h


def image(x: Tensor) -> Tensor:
    """(batch, tokens, width) -> (batch, width, h, w)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid(x))


def rows(x: Tensor) -> Tensor:
    """(batch, width, h, w) -> (batch, tokens, width)."""
    return x.flatten(2).transpose(1, 2)


def turn(x: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return x.transpose(-1, -2)


def token_mask(x: Tensor) -> Tensor:
    """(tokens, 1), True for every other token."""
    return (torch.arange(x.shape[1], device=x.device) % 2 == 0)[:, None]


def channel_mask(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], device=x.device) % 2 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Writers: from a norm's output to what is added to the stream


def _attention(m: Any, h: Tensor) -> Tensor:
    q, k, v = m.qkv(h).chunk(3, -1)
    heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    return m.l(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def _plain_attention(m: Any, h: Tensor) -> Tensor:
    """The value projection writes; the tokens are mixed after it."""
    weights = (m.q(h) @ m.k(h).transpose(1, 2)).softmax(-1)
    return weights @ m.l(h)


def _experts(m: Any, h: Tensor) -> Tensor:
    gates = m.router(h).softmax(-1)
    return gates[..., :1] * m.l(h) + gates[..., 1:] * m.k(h)


def _sparse_experts(m: Any, h: Tensor) -> Tensor:
    gates = m.router(h).softmax(-1)
    return torch.where(gates[..., :1] > 0.5, m.l(h), m.k(h))


def _scattered(m: Any, h: Tensor) -> Tensor:
    chosen = token_mask(h).expand(h.shape[0], h.shape[1], 1)
    source = m.l(h).flatten(0, 1)
    return torch.zeros_like(h).masked_scatter(chosen.expand_as(h), source)


WRITERS: dict[str, Build] = {
    "linear": with_linear(lambda m, h: m.l(h)),
    "linear_nobias": with_linear(lambda m, h: m.l(h), bias=False),
    "mlp": with_two(lambda m, h: m.l(F.gelu(m.k(h)))),
    "low_rank": lambda s: Op(lambda m, h: m.up(m.down(h)), down=nn.Linear(s.width, 2), up=nn.Linear(2, s.width)),
    "matmul": lambda s: Op(lambda m, h: h @ m.w, w=param(s.width, s.width)),
    "matmul_transposed": lambda s: Op(lambda m, h: h @ m.w.T, w=param(s.width, s.width)),
    "matmul_left": lambda s: Op(lambda m, h: (m.w @ h.transpose(1, 2)).transpose(1, 2), w=param(s.width, s.width)),
    "matmul_batched": lambda s: Op(lambda m, h: h @ m.w, w=param(1, s.width, s.width)),
    "addmm": lambda s: Op(
        lambda m, h: torch.addmm(m.b, h.view(-1, h.shape[-1]), m.w).view(h.shape),
        w=param(s.width, s.width),
        b=param(s.width),
    ),
    "addmm_scaled": lambda s: Op(
        lambda m, h: torch.addmm(m.b, h.reshape(-1, h.shape[-1]), m.w, beta=0.5, alpha=2).view(h.shape),
        w=param(s.width, s.width),
        b=param(s.width),
    ),
    "einsum": lambda s: Op(lambda m, h: torch.einsum("btd,de->bte", h, m.w), w=param(s.width, s.width)),
    "einsum_transposed": lambda s: Op(lambda m, h: torch.einsum("btd,ed->bte", h, m.w), w=param(s.width, s.width)),
    "einsum_heads": lambda s: Op(
        lambda m, h: torch.einsum("bthk,hkd->btd", h.unflatten(-1, (2, -1)), m.w), w=param(2, s.width // 2, s.width)
    ),
    "functional": lambda s: Op(lambda m, h: F.linear(h, m.w, m.b), w=param(s.width, s.width), b=param(s.width)),
    "conv1": lambda s: Op(lambda m, h: rows(m.l(image(h))), l=nn.Conv2d(s.width, s.width, 1)),
    "conv3": lambda s: Op(
        lambda m, h: m.l(h.transpose(1, 2)).transpose(1, 2), l=nn.Conv1d(s.width, s.width, 3, padding=1, bias=False)
    ),
    "conv_transpose": lambda s: Op(
        lambda m, h: m.l(h.transpose(1, 2)).transpose(1, 2), l=nn.ConvTranspose1d(s.width, s.width, 1)
    ),
    "conv_groups": lambda s: Op(lambda m, h: rows(m.l(image(h))), l=nn.Conv2d(s.width, s.width, 1, groups=2)),
    "conv_depthwise": lambda s: Op(
        lambda m, h: rows(m.l(image(h))), l=nn.Conv2d(s.width, s.width, 3, padding=1, groups=s.width)
    ),
    "conv_pooled": lambda s: Op(
        lambda m, h: rows(F.avg_pool2d(m.l(image(h)), 3, 1, 1)), l=nn.Conv2d(s.width, s.width, 1)
    ),
    "conv_max_pooled": lambda s: Op(
        lambda m, h: rows(F.max_pool2d(m.l(image(h)), 3, 1, 1)), l=nn.Conv2d(s.width, s.width, 1)
    ),
    "attention": lambda s: Op(_attention, qkv=linear(s, 3 * s.width), l=linear(s)),
    "attention_plain": lambda s: Op(_plain_attention, q=linear(s), k=linear(s), l=linear(s)),
    "attention_values": with_linear(lambda m, h: F.scaled_dot_product_attention(h, h, m.l(h))),
    "attention_masked": with_linear(
        lambda m, h: F.scaled_dot_product_attention(
            h, h, m.l(h), attn_mask=token_mask(h).T.expand(h.shape[1], h.shape[1])
        )
    ),
    "fused_halves": lambda s: Op(lambda m, h: sum(m.l(h).chunk(2, -1)), l=linear(s, 2 * s.width)),
    "fused_split": lambda s: Op(
        lambda m, h: (lambda a, b: a.sigmoid().mean(-1, keepdim=True) * b)(*m.l(h).split(h.shape[-1], -1)),
        l=linear(s, 2 * s.width),
    ),
    "fused_uneven": lambda s: Op(
        lambda m, h: (lambda a, b: a.sigmoid() * b)(*m.l(h).split([1, h.shape[-1]], -1)), l=linear(s, s.width + 1)
    ),
    "fused_view": lambda s: Op(lambda m, h: m.l(h).unflatten(-1, (2, -1)).sum(2), l=linear(s, 2 * s.width)),
    "fused_view_inner": lambda s: Op(lambda m, h: m.l(h).unflatten(-1, (-1, 2)).mean(-1), l=linear(s, 2 * s.width)),
    "fused_slice": lambda s: Op(lambda m, h: m.l(h)[..., h.shape[-1] :], l=linear(s, 2 * s.width)),
    "fused_slice_shifted": lambda s: Op(lambda m, h: m.l(h)[..., 1 : 1 + h.shape[-1]], l=linear(s, 2 * s.width)),
    "fused_slice_strided": lambda s: Op(lambda m, h: m.l(h)[..., ::2], l=linear(s, 2 * s.width)),
    "halves": lambda s: Op(
        lambda m, h: torch.cat([m.l(h), m.k(h)], -1), l=linear(s, s.width // 2), k=linear(s, s.width - s.width // 2)
    ),
    "doubled": with_two(lambda m, h: torch.cat([m.l(h), m.k(h)], -1).unflatten(-1, (2, -1))[:, :, 1]),
    "upscaled": lambda s: Op(
        lambda m, h: rows(F.avg_pool2d(F.pixel_shuffle(m.l(image(h)), 2), 2)), l=nn.Conv2d(s.width, 4 * s.width, 1)
    ),
    "stacked": with_two(lambda m, h: torch.stack([m.l(h), m.k(h)]).sum(0)),
    "stacked_last": with_two(lambda m, h: torch.stack([m.l(h), m.k(h)], -1).mean(-1)),
    "product_weight": lambda s: Op(lambda m, h: h @ (m.v @ m.w), v=param(s.width, 2), w=param(2, s.width)),
    "scaled_weight": lambda s: Op(lambda m, h: F.linear(h, 0.5 * m.w), w=param(s.width, s.width)),
    "gained_weight": lambda s: Op(lambda m, h: F.linear(h, m.g * m.w), w=param(s.width, s.width), g=param(s.width, 1)),
    "sliced_weight": lambda s: Op(lambda m, h: F.linear(h, m.w[: h.shape[-1]]), w=param(2 * s.width, s.width)),
    "both_slices": lambda s: Op(
        lambda m, h: F.linear(h, m.w[: h.shape[-1]]) + F.linear(h, m.w[h.shape[-1] :]), w=param(2 * s.width, s.width)
    ),
    "standardised_weight": lambda s: Op(
        lambda m, h: F.linear(h, m.w - m.w.mean(1, keepdim=True)), w=param(s.width, s.width)
    ),
    "column_weight": lambda s: Op(lambda m, h: F.linear(h, m.w - m.w.mean(0, keepdim=True)), w=param(s.width, s.width)),
    "used_twice": with_linear(lambda m, h: m.l(h) + m.l(F.gelu(h))),
    "used_inside": with_linear(lambda m, h: m.l(F.gelu(m.l(h)))),
    "both_ways": lambda s: Op(lambda m, h: F.gelu(h @ m.w) @ m.w.T, w=param(s.width, s.width)),
    "bias_elsewhere": lambda s: Op(lambda m, h: m.l(h + m.l.bias), l=linear(s)),
    "bias_only": lambda s: Op(lambda m, h: m.b * (h[..., :1] < 1e9), b=param(s.width)),
    "per_token": lambda s: Op(lambda m, h: h.sigmoid().mean(-1, keepdim=True) * m.b, b=param(s.width)),
    "position": lambda s: Op(lambda m, h: m.b * (h[..., :1] < 1e9), b=param(1, s.fix(), s.width)),
    "experts": lambda s: Op(_experts, router=nn.Linear(s.width, 2), l=linear(s), k=linear(s)),
    "experts_sparse": lambda s: Op(_sparse_experts, router=nn.Linear(s.width, 2), l=linear(s), k=linear(s)),
    "experts_einsum": lambda s: Op(
        lambda m, h: torch.einsum("bte,btd,edk->btk", m.router(h).softmax(-1), h, m.w),
        router=nn.Linear(s.width, 3),
        w=param(3, s.width, s.width),
    ),
    "scattered": with_linear(_scattered),
    "token_gated": lambda s: Op(lambda m, h: m.g(h).sigmoid() * m.l(h), l=linear(s), g=nn.Linear(s.width, 1)),
    "token_mixed": lambda s: Op(lambda m, h: m.w @ m.l(h), l=linear(s), w=param(s.fix(), s.tokens)),
    "token_mixer": lambda s: Op(lambda m, h: m.w(h.transpose(1, 2)).transpose(1, 2), w=nn.Linear(s.fix(), s.tokens)),
    "token_mixer_left": lambda s: Op(lambda m, h: m.w @ h, w=param(s.fix(), s.tokens)),
    "token_conv": lambda s: Op(lambda m, h: m.l(h), l=nn.Conv1d(s.fix(), s.tokens, 1)),
    "token_mean": with_linear(lambda m, h: m.l(h).mean(1, keepdim=True).expand_as(h)),
    "token_cumsum": with_linear(lambda m, h: m.l(h).cumsum(1)),
    "in_place": with_linear(lambda m, h: m.l(h).mul_(2.0)),
    "in_place_bias": lambda s: Op(lambda m, h: m.l(h).add_(m.b), l=linear(s, bias=False), b=param(s.width)),
    "plus_one": with_linear(lambda m, h: m.l(h) + 1.0),
    "gelu_last": with_linear(lambda m, h: F.gelu(m.l(h))),
    "relu_in_place": with_linear(lambda m, h: m.l(h).relu_()),
    "gated": with_two(lambda m, h: m.l(h) * m.k(h).sigmoid()),
    "product": with_two(lambda m, h: m.l(h) * m.k(h)),
    "max_over_tokens": with_linear(lambda m, h: m.l(h).amax(1, keepdim=True).expand_as(h)),
    "norm_output": simple(lambda h: h),
    "softmax": with_linear(lambda m, h: m.l(h).softmax(-1)),
    "normalised": with_linear(lambda m, h: F.normalize(m.l(h), dim=-1)),
    "clamped": with_linear(lambda m, h: m.l(h).clamp(-1, 1)),
    "channel_mean": with_linear(lambda m, h: m.l(h).mean(-1, keepdim=True).expand_as(h)),
    "double_buffered": with_linear(lambda m, h: torch.cat([m.l(h[:, :1]), m.l(h[:, 1:])], 1)),
    "one_hot_table": lambda s: Op(lambda m, h: F.embedding(h.argmax(-1), m.w), w=param(s.width, s.width)),
    "bilinear": lambda s: Op(lambda m, h: m.l(h, h), l=nn.Bilinear(s.width, s.width, s.width)),
    "lerp": with_two(lambda m, h: torch.lerp(m.l(h), m.k(h), 0.3)),
    "flipped": with_linear(lambda m, h: m.l(h).flip(-1)),
    "rolled": with_linear(lambda m, h: m.l(h).roll(1, -1)),
    "rolled_flat": with_linear(lambda m, h: m.l(h).roll(1)),
}
"""A norm's output (batch, tokens, width) -> what is added to the stream, same shape."""


# ---------------------------------------------------------------------------------------------------------------------
# Scales: what happens to a branch before it is added


def _drop_path(m: Any, y: Tensor) -> Tensor:
    return F.dropout(y, 0.5, m.training) * torch.ones(y.shape[0], 1, 1, device=y.device, dtype=y.dtype)


SCALES: dict[str, Build] = {
    "none": simple(lambda y: y),
    "gamma": lambda s: Op(lambda m, y: y * m.g, g=param(s.width)),
    "gamma_left": lambda s: Op(lambda m, y: m.g * y, g=param(s.width)),
    "gamma_ranked": lambda s: Op(lambda m, y: m.g * y, g=param(1, 1, s.width)),
    "gamma_viewed": lambda s: Op(lambda m, y: m.g.view(1, 1, -1) * y, g=param(s.width)),
    "gamma_in_place": lambda s: Op(lambda m, y: y.mul_(m.g), g=param(s.width)),
    "gamma_image": lambda s: Op(lambda m, y: rows(image(y) * m.g[:, None, None]), g=param(s.width)),
    "gamma_twice": lambda s: Op(lambda m, y: m.g * (y * m.g), g=param(s.width)),
    "gamma_two": lambda s: Op(lambda m, y: m.g * (y * m.k), g=param(s.width), k=param(s.width)),
    "gamma_plus_one": lambda s: Op(lambda m, y: (1 + m.g) * y, g=param(s.width)),
    "gamma_tanh": lambda s: Op(lambda m, y: m.g.tanh() * y, g=param(s.width)),
    "gamma_scaled": lambda s: Op(lambda m, y: (2 * m.g) * y, g=param(s.width)),
    "gamma_tripled": lambda s: Op(lambda m, y: m.g * (3 * y), g=param(s.width)),
    "gamma_flipped": lambda s: Op(lambda m, y: m.g.flip(0) * y, g=param(s.width)),
    "gamma_also_bias": lambda s: Op(lambda m, y: m.g * y + m.g, g=param(s.width)),
    "gamma_then_bias": lambda s: Op(lambda m, y: m.g * y + m.b, g=param(s.width), b=param(s.width)),
    "gamma_after_one": lambda s: Op(lambda m, y: m.g * (y + 1), g=param(s.width)),
    "gamma_after_bias": lambda s: Op(lambda m, y: m.g * (y + m.b), g=param(s.width), b=param(s.width)),
    "gamma_divides": lambda s: Op(lambda m, y: y / (m.g.abs() + 1), g=param(s.width)),
    "gamma_masks": lambda s: Op(lambda m, y: torch.where(m.g > 0, y, 0.0), g=param(s.width)),
    "gamma_residual": lambda s: Op(lambda m, y: y + m.g * y, g=param(s.width)),
    "gamma_mixes_tokens": lambda s: Op(lambda m, y: (m.g * y).mean(1, keepdim=True).expand_as(y), g=param(s.width)),
    "gamma_tokens": lambda s: Op(lambda m, y: m.g * y, g=param(s.fix(), 1)),
    "gamma_square": lambda s: Op(lambda m, y: m.g * y, g=param(s.fix(), s.width)),
    "gamma_heads": lambda s: Op(lambda m, y: (y.unflatten(-1, (2, -1)) * m.g).flatten(2), g=param(s.width // 2)),
    "scalar": lambda s: Op(lambda m, y: m.g * y, g=param(1)),
    "scalar_tanh": lambda s: Op(lambda m, y: m.g.tanh() * y, g=param(1)),
    "number": simple(lambda y: -0.7 * y),
    "divided": simple(lambda y: y / 3),
    "dropped": lambda s: Op(_drop_path),
    "dropout": lambda s: nn.Dropout(0.3),
    "addcmul": lambda s: Op(lambda m, y: torch.addcmul(m.b, m.g, y), g=param(s.width), b=param(s.width)),
}
"""A branch (batch, tokens, width) -> the same, scaled."""

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "radd": lambda x, y: y + x,
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: torch.rsub(x, y),
    "alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "weighted": lambda x, y: 0.3 * x + y * 0.7,
    "halved": lambda x, y: (x + y) / 2**0.5,
    "stacked": lambda x, y: torch.stack([x, y], 1).sum(1),
    "add_": lambda x, y: x.clone().add_(y),
    "first_token": lambda x, y: torch.cat([x[:, :1] + y[:, :1], x[:, 1:]], 1),
    "masked": lambda x, y: torch.where(token_mask(x), x, y),
    "cat_mean": lambda x, y: torch.cat([x, y], 1).unflatten(1, (2, -1)).mean(1),
}
"""The stream and a branch -> the stream. All are linear and treat every channel alike."""


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _iadd_token(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] += y[:, 0]
    return x


def _set_token(x: Tensor, y: Tensor) -> Tensor:
    x[:, :1] = y[:, :1]
    return x


def _add_through_view(x: Tensor, y: Tensor) -> Tensor:
    x.view(-1, x.shape[-1]).add_(y.reshape(-1, x.shape[-1]))
    return x


def _index_add(x: Tensor, y: Tensor) -> Tensor:
    x[:, torch.arange(x.shape[1], device=x.device)] += y
    return x


IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iadd": _iadd,
    "iadd_token": _iadd_token,
    "set_token": _set_token,
    "add_through_view": _add_through_view,
    "index_add": _index_add,
    "mul_": lambda x, y: x.mul_(0.5).add_(y),
    "channel": lambda x, y: x.index_copy_(2, torch.zeros(1, dtype=torch.long, device=x.device), y[..., :1]),
}
"""Like `JOINS`, writing into the stream's own memory."""
JOINS_OPAQUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, y: x * y,
    "by_channel": lambda x, y: torch.where(channel_mask(x), x, y),
    "maximum": torch.maximum,
    "residual_product": lambda x, y: x + x * y,
}
"""Joins that treat channels differently."""
