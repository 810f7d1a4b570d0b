"""More parts of random networks: the layouts and operations that a stream passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.network_parts import (
    Build,
    Op,
    Size,
    channel_mask,
    exact,
    grid,
    image,
    linear,
    param,
    rows,
    simple,
    token_mask,
    turn,
)

# ---------------------------------------------------------------------------------------------------------------------
# Detours: to another layout and back; between the two something happens on the channel axis


def _unfold(x: Tensor) -> Tensor:
    """MobileViT: (b, t, c) -> (b, patch, patches, c) through a merged b*c*h axis."""
    x = image(x)
    b, c, h, w = x.shape
    p, q = (2 if h % 2 == 0 else 1), (2 if w % 2 == 0 else 1)
    x = x.reshape(b * c * (h // p), p, w // q, q).transpose(1, 2)
    return x.reshape(b, c, (h // p) * (w // q), p * q).transpose(1, 3)


def _fold(x: Tensor, like: Tensor) -> Tensor:
    b, _, c, h, w = *like.shape[:1], 0, like.shape[2], *grid(like)
    p, q = (2 if h % 2 == 0 else 1), (2 if w % 2 == 0 else 1)
    x = x.transpose(1, 3).reshape(b * c * (h // p), w // q, p, q).transpose(1, 2)
    return rows(x.reshape(b, c, h, w))


def _windows(x: Tensor) -> Tensor:
    h, w = grid(x)
    x = x.view(x.shape[0], h, 1, w, 1, x.shape[2]) if w % 2 else x.view(x.shape[0], h, 1, w // 2, 2, x.shape[2])
    return x.permute(0, 1, 3, 2, 4, 5).flatten(0, 2)


def _unwindow(x: Tensor, like: Tensor) -> Tensor:
    h, w = grid(like)
    q = 1 if w % 2 else 2
    return x.view(like.shape[0], h, w // q, 1, q, -1).permute(0, 1, 3, 2, 4, 5).reshape(like.shape)


Detour = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], int]
DETOURS: dict[str, Detour] = {
    "none": (lambda x: x, lambda y, x: y, -1),
    "transpose": (lambda x: x.transpose(1, 2), lambda y, x: y.transpose(1, 2), 1),
    "transpose_copied": (lambda x: x.transpose(1, 2).contiguous(), lambda y, x: y.mT, 1),
    "tokens_first": (lambda x: x.permute(1, 2, 0), lambda y, x: y.permute(2, 0, 1), 1),
    "channels_first": (lambda x: x.permute(2, 1, 0), lambda y, x: y.permute(2, 1, 0), 0),
    "batch_second": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1), -1),
    "moved": (lambda x: x.movedim(2, 0), lambda y, x: y.movedim(0, -1), 0),
    "image": (image, lambda y, x: rows(y), 1),
    "image_last": (lambda x: x.unflatten(1, grid(x)), lambda y, x: y.flatten(1, 2), -1),
    "merged": (lambda x: x.reshape(-1, x.shape[2]), lambda y, x: y.view(x.shape), -1),
    "merged_rows": (
        lambda x: x.transpose(1, 2).reshape(-1, x.shape[1]),
        lambda y, x: y.unflatten(0, (-1, x.shape[2])).transpose(-1, -2),
        99,
    ),
    "flat": (lambda x: x.flatten(1), lambda y, x: y.view(x.shape), 99),
    "flat_channels": (
        lambda x: turn(x).flatten(1),
        lambda y, x: y.unflatten(1, (x.shape[2], -1)).transpose(-1, -2),
        99,
    ),
    "all_flat": (lambda x: x.flatten(), lambda y, x: y.view(x.shape), 99),
    "heads": (lambda x: x.unflatten(-1, (2, -1)), lambda y, x: y.flatten(-2), 99),
    "unsqueezed": (lambda x: x.unsqueeze(1), lambda y, x: y.squeeze(1), -1),
    "unfolded": (_unfold, _fold, -1),
    "windows": (_windows, _unwindow, -1),
    "stacked": (lambda x: torch.stack([x, 2 * x], 1), lambda y, x: y.unbind(1)[1], -1),
    "doubled": (lambda x: torch.cat([x, 2 * x], -1), lambda y, x: y.chunk(2, -1)[1], 99),
    "doubled_outer": (lambda x: torch.cat([x, 2 * x], -1), lambda y, x: y.unflatten(-1, (2, -1))[:, :, 0], 99),
    "doubled_wrong": (lambda x: torch.cat([x, 2 * x], -1), lambda y, x: y.unflatten(-1, (-1, 2))[..., 0], 99),
    "split": (lambda x: x, lambda y, x: torch.cat(y.split([1, y.shape[1] - 1], 1), 1), -1),
    "split_channels": (lambda x: x, lambda y, x: torch.cat(y.split([1, y.shape[2] - 1], 2), 2), -1),
    "swapped_halves": (lambda x: x, lambda y, x: torch.cat(y.chunk(2, -1)[::-1], -1), -1),
    "square": (lambda x: turn(x) if x.shape[1] == x.shape[2] else x, lambda y, x: y, -1),
    "wrong_view": (lambda x: turn(x).contiguous().view(x.shape), lambda y, x: y, -1),
}
"""To a layout, back to (batch, tokens, width), and the channel axis there (99: it is only a factor of one)."""


def _along(p: Tensor, x: Tensor, axis: int) -> Tensor:
    """A vector shaped to broadcast along ``axis`` of x; one number as it is."""
    return p.view([-1] + [1] * (x.ndim - 1 - axis % x.ndim)) if p.numel() > 1 else p


def _others(x: Tensor, axis: int) -> list[int]:
    return [d for d in range(x.ndim) if axis == 99 or d != axis % x.ndim]


Action = Callable[[Tensor, int, Tensor], Tensor]
ACTIONS: dict[str, tuple[str, Action]] = {
    "nothing": ("", lambda x, a, p: x),
    "number": ("", lambda x, a, p: x * -1.5),
    "bias": ("channels", lambda x, a, p: x + _along(p, x, a)),
    "bias_in_place": ("channels", lambda x, a, p: x.clone().add_(_along(p, x, a))),
    "scalar_bias": ("one", lambda x, a, p: x + p),
    "rolled": ("", lambda x, a, p: x.roll(1, _others(x, a)[-1])),
    "flipped_all": ("", lambda x, a, p: x.flip(_others(x, a))),
    "gain": ("channels", lambda x, a, p: x * _along(p, x, a)),
    "last_bias": ("many", lambda x, a, p: x + p[: x.shape[-1]]),
    "mean": ("", lambda x, a, p: x - x.mean(0, keepdim=True)),
}
"""What happens between the ways of a detour, given the value, the channel axis and a parameter of that many numbers."""


def detour(name: str, action: str) -> Build:
    go, back, axis = DETOURS[name]
    kind, act = ACTIONS[action]

    def build(s: Size) -> nn.Module:
        s.exact = s.exact or name in ("square", "wrong_view")
        count = {"": 0, "one": 1, "channels": s.width if axis < 99 else 1, "many": 512}[kind]
        parts = {"p": param(count)} if count else {}
        return Op(lambda m, x: back(act(go(x), axis, m.p if count else x), x), **parts)

    return build


# ---------------------------------------------------------------------------------------------------------------------
# What a stream passes through


def _mutating(m: Any, x: Tensor) -> Tensor:
    m.inner(x)
    return x


def _adds_in_place(m: Any, x: Tensor) -> None:
    x += F.gelu(m.p)


def _aliased(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    y += m.p
    return x


PASSES: dict[str, Build] = {
    "drop_first": simple(lambda x: x[:, 1:] if x.shape[1] > 1 else x),
    "drop_last": simple(lambda x: x[:, : max(x.shape[1] - 1, 1)]),
    "every_other": simple(lambda x: x[:, ::2]),
    "last_token": simple(lambda x: x[:, -1:]),
    "select_token": simple(lambda x: x[:, 0].unsqueeze(1)),
    "registers": lambda s: Op(lambda m, x: torch.cat([m.p.expand(x.shape[0], -1, -1), x], 1), p=param(1, 2, s.width)),
    "class_token": lambda s: Op(lambda m, x: torch.cat([m.p.repeat(x.shape[0], 1, 1), x], 1), p=param(1, 1, s.width)),
    "buffer_token": lambda s: _with_buffer(lambda m, x: torch.cat([m.b.expand(x.shape[0], 1, -1), x], 1), s),
    "pad": simple(lambda x: F.pad(x, (0, 0, 1, 1))),
    "pad_value": simple(lambda x: F.pad(x, (0, 0, 0, 1), value=0.5)),
    "pad_replicate": simple(lambda x: F.pad(turn(x), (1, 0), mode="replicate").transpose(-1, -2)),
    "pad_channels": simple(lambda x: F.pad(x, (1, 0))[..., 1:]),
    "crop": simple(lambda x: F.pad(x, (0, 0, 0, -1)) if x.shape[1] > 1 else x),
    "flip": simple(lambda x: x.flip(1)),
    "roll": simple(lambda x: x.roll(1, 1)),
    "roll_flat": simple(lambda x: x.roll(1)),
    "roll_two": simple(lambda x: torch.roll(image(x), (1, 1), (2, 3)).flatten(2).transpose(-1, -2)),
    "flip_channels": simple(lambda x: x.flip(-1)),
    "index": simple(lambda x: x[:, torch.arange(x.shape[1], device=x.device) // 2]),
    "index_rows": simple(lambda x: x[torch.zeros(x.shape[0], dtype=torch.long, device=x.device)]),
    "index_both": simple(
        lambda x: x[torch.arange(x.shape[0], device=x.device)[:, None], torch.arange(x.shape[1], device=x.device)]
    ),
    "index_select": simple(lambda x: x.index_select(1, torch.arange(x.shape[1], device=x.device) // 2)),
    "gather": simple(
        lambda x: x.gather(
            1, (torch.arange(x.shape[1], device=x.device) // 2)[None, :, None].expand(x.shape[0], -1, x.shape[2])
        )
    ),
    "gather_channels": simple(
        lambda x: x.gather(1, (torch.arange(x.shape[2], device=x.device) % x.shape[1]).expand(x.shape[0], 1, -1))
    ),
    "take_along": simple(lambda x: torch.take_along_dim(x, torch.zeros(1, 1, 1, dtype=torch.long, device=x.device), 1)),
    "repeat": simple(lambda x: x.repeat(1, 2, 1) if x.shape[1] < 7 else x),
    "repeat_interleave": simple(lambda x: x.repeat_interleave(2, 1) if x.shape[1] < 7 else x),
    "mean_token": simple(lambda x: x.mean(1, keepdim=True)),
    "sum_token": simple(lambda x: x.sum(1).unsqueeze(1)),
    "mean_batch": simple(lambda x: x.mean(0, keepdim=True).expand(x.shape[0], -1, -1)),
    "minus_mean_token": simple(lambda x: x - x.mean(1, keepdim=True)),
    "avg_pool": simple(lambda x: F.avg_pool1d(turn(x), 2, 1).transpose(-1, -2) if x.shape[1] > 1 else x),
    "avg_pool_channels": simple(lambda x: F.avg_pool1d(x, 3, 1, 1)),
    "avg_pool_wide": simple(lambda x: F.avg_pool2d(x.unsqueeze(1), (1, 3), 1, (0, 1)).squeeze(1)),
    "adaptive_pool": simple(lambda x: F.adaptive_avg_pool1d(turn(x), 2).transpose(-1, -2)),
    "max_pool": simple(lambda x: F.max_pool1d(turn(x), 2, 1).transpose(-1, -2) if x.shape[1] > 1 else x),
    "upsample": simple(lambda x: F.interpolate(turn(x), scale_factor=2.0).transpose(-1, -2) if x.shape[1] < 7 else x),
    "upsample_linear": simple(lambda x: F.interpolate(turn(x), size=3, mode="linear").transpose(-1, -2)),
    "upsample_image": simple(lambda x: rows(F.interpolate(image(x), size=(2, 2), mode="bilinear"))),
    "upsample_channels": simple(lambda x: F.interpolate(x, size=x.shape[2], mode="linear", align_corners=False)),
    "blur_channels": simple(
        lambda x: F.interpolate(F.interpolate(x, size=2, mode="linear"), size=x.shape[2], mode="linear")
    ),
    "number": simple(lambda x: 1.7 * x),
    "divided": simple(lambda x: x / 2),
    "negated": simple(lambda x: -x),
    "plus_zero": simple(lambda x: x + 0),
    "plus_one": simple(lambda x: x + 1.0),
    "one_minus": simple(lambda x: 1 - x),
    "doubled": simple(lambda x: x + x),
    "scaled_width": simple(lambda x: x * x.shape[-1] ** 0.5),
    "scalar": lambda s: Op(lambda m, x: m.p * x, p=param(1)),
    "gain": lambda s: Op(lambda m, x: m.p * x, p=param(s.width)),
    "buffer_scale": lambda s: _with_buffer(lambda m, x: m.b * x, s),
    "buffer_added": lambda s: _with_buffer(lambda m, x: m.b + x, s),
    "buffer_stored": lambda s: _with_buffer(lambda m, x: m.b + x, s, persistent=True),
    "token_gate": lambda s: Op(
        lambda m, x: m.g(m.n(x)).sigmoid() * x, n=nn.LayerNorm(s.width), g=nn.Linear(s.width, 1)
    ),
    "channel_gate": lambda s: Op(lambda m, x: m.g(m.n(x)).sigmoid() * x, n=nn.LayerNorm(s.width), g=linear(s)),
    "divide_gate": lambda s: Op(
        lambda m, x: x / (1 + m.g(m.n(x)).exp()), n=nn.LayerNorm(s.width), g=nn.Linear(s.width, 1)
    ),
    "masked": simple(lambda x: torch.where(token_mask(x), x, 0.0)),
    "masked_value": simple(lambda x: torch.where(token_mask(x), x, 0.5)),
    "masked_fill": simple(lambda x: x.masked_fill(token_mask(x), 0.0)),
    "masked_fill_one": simple(lambda x: x.masked_fill(token_mask(x), 1.0)),
    "masked_channels": simple(lambda x: x.masked_fill(channel_mask(x), 0.0)),
    "masked_square": simple(lambda x: x * torch.ones(x.shape[1], x.shape[2], device=x.device, dtype=x.dtype).tril()),
    "mask_token": lambda s: Op(lambda m, x: torch.where(token_mask(x), m.p, x), p=param(s.width)),
    "mask_multiplied": simple(lambda x: x * token_mask(x)),
    "mask_by_norm": lambda s: Op(
        lambda m, x: torch.where(m.n(x).mean(-1, keepdim=True) > 0, x, 0), n=nn.LayerNorm(s.width)
    ),
    "dropout": lambda s: nn.Dropout(0.2),
    "dropout_tokens": lambda s: nn.Dropout1d(0.2),
    "identity": lambda s: nn.Identity(),
    "typed": simple(lambda x: x.to(x.dtype)),
    "double": simple(lambda x: x.double().type_as(x)),
    "expanded": simple(lambda x: x[:, :1].expand(-1, x.shape[1], -1)),
    "broadcast": simple(lambda x: torch.broadcast_to(x.mean(1, keepdim=True), x.shape)),
    "detached": simple(lambda x: x.detach()),
    "cumulated": simple(lambda x: x.cumsum(1)),
    "mixed": lambda s: Op(lambda m, x: m.p @ x, p=param(s.fix(), s.tokens)),
    "mixed_einsum": lambda s: Op(lambda m, x: torch.einsum("st,btd->bsd", m.p, x), p=param(s.fix(), s.tokens)),
    "mixed_attention": lambda s: Op(
        lambda m, x: (lambda h: F.scaled_dot_product_attention(h, h, x))(m.n(x)), n=nn.LayerNorm(s.width)
    ),
    "mixed_softmax": lambda s: Op(
        lambda m, x: (lambda h: (h @ turn(h)).softmax(-1) @ x)(m.n(x)), n=nn.LayerNorm(s.width)
    ),
    "mixed_linear": lambda s: Op(lambda m, x: turn(m.l(turn(x))), l=nn.Linear(s.fix(), s.tokens, bias=False)),
    "mixed_linear_bias": lambda s: Op(lambda m, x: turn(m.l(turn(x))), l=nn.Linear(s.fix(), s.tokens)),
    "mixed_conv": lambda s: Op(lambda m, x: m.l(x), l=nn.Conv1d(s.fix(), s.tokens, 1, bias=False)),
    "depthwise": lambda s: Op(
        lambda m, x: turn(m.l(turn(x))),
        l=nn.Conv1d(s.width, s.width, 1, groups=s.width, bias=False),
    ),
    "blend": lambda s: Op(lambda m, x: m.p * x + (1 - m.p) * x.flip(1), p=param(1)),
    "lerp": simple(lambda x: torch.lerp(x, x.flip(1), 0.3)),
    "set_first": lambda s: Op(_set_first, p=param(s.width)),
    "mutated_by_module": lambda s: Op(_mutating, inner=Op(_adds_in_place, p=param(s.width))),
    "mutated_alias": lambda s: Op(_aliased, inner=Op(lambda m, x: x, q=param(1)), p=param(s.width)),
    "mutated_view": simple(lambda x: (lambda y: (y[:, :1].mul_(2), y)[1])(x.clone())),
    "masked_scatter": lambda s: Op(
        lambda m, x: x.masked_scatter(token_mask(x).expand_as(x), m.p.expand(x.shape[0], x.shape[1], -1)),
        p=param(s.width),
    ),
    "index_put": lambda s: Op(_index_put, p=param(s.width)),
    "scatter": simple(lambda x: torch.zeros_like(x).scatter(1, torch.zeros_like(x, dtype=torch.long), x)),
    "squares": exact(simple(lambda x: turn(x)[:, :, : x.shape[2]].contiguous() if x.shape[1] == x.shape[2] else x)),
    "sorted": simple(lambda x: x.sort(1).values),
    "tril": simple(lambda x: x.tril()),
    "full_added": simple(lambda x: x + torch.full((x.shape[2],), 0.3, device=x.device, dtype=x.dtype)),
    "zeros_added": simple(lambda x: x + torch.zeros_like(x)),
    "ones_added": simple(lambda x: x + torch.ones(x.shape[2], device=x.device, dtype=x.dtype)),
    "arange_added": simple(lambda x: x + torch.arange(x.shape[2], device=x.device, dtype=x.dtype)),
    "sinusoids": simple(lambda x: x + torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None].sin()),
    **{f"detour_{name}": detour(name, "bias") for name in DETOURS},
    **{f"action_{name}": detour("image", name) for name in ACTIONS},
}
"""Stream (batch, tokens, width) -> stream; the number of tokens may change."""


def _with_buffer(function: Callable[..., Tensor], s: Size, persistent: bool = False) -> nn.Module:
    module = Op(function)
    value = torch.linspace(-1.0, 2.0, s.width, dtype=torch.get_default_dtype())
    module.register_buffer("b", value, persistent=persistent)
    return module


def _set_first(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = m.p
    return x


def _index_put(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.zeros(1, dtype=torch.long, device=x.device)] = m.p
    return x
