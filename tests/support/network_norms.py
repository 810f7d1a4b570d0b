"""More parts of random networks: norms in all their spellings, and features that see more of a stream than a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.network_parts import Build, Op, Size, exact, image, linear, param, rows, simple, turn


def _by_hand(m: Any, x: Tensor, axis: int = -1, eps: float = 1e-5) -> Tensor:
    """Cohere's spelling."""
    mean = x.mean(axis, keepdim=True)
    variance = (x - mean).pow(2).mean(axis, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _rms(m: Any, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Llama's spelling."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _divided(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return m.gain * (centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)) + m.b


def _alpha(m: Any, x: Tensor) -> Tensor:
    centred = torch.sub(x, x.mean(-1, keepdim=True), alpha=2)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * m.gain + m.b


def _population(m: Any, x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * m.gain + m.b


def _uncentred_variance(m: Any, x: Tensor) -> Tensor:
    """The mean is taken off the value, but not in the variance."""
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * m.gain + m.b


def _moments(m: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean**2 + 1e-5) ** 0.5 * m.gain + m.b


def _var_mean(m: Any, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0)
    return (x - mean.unsqueeze(-1)) * (1 / torch.sqrt(variance + 1e-5)).unsqueeze(-1) * m.gain + m.b


def _length(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5 * m.gain + m.b


def _spread(m: Any, x: Tensor, unbiased: bool, eps: float) -> Tensor:
    """The epsilon stands outside the root, or the number of channels is less by one: no LayerNorm."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=unbiased) + eps) * m.gain + m.b


def _rms_seen(m: Any, x: Tensor) -> Tensor:
    """The mean square goes elsewhere, too."""
    square = x.pow(2).mean(-1, keepdim=True)
    return m.gain * (x * torch.rsqrt(square + 1e-5)) + m.b * square


def own(function: Callable[[Any, Tensor], Tensor], bias: bool = True) -> Build:
    """A norm module with a gain and a bias of its own."""
    return lambda s: Op(function, gain=param(s.width), **({"b": param(s.width)} if bias else {}))


def called(change: Callable[[Any, Tensor], Tensor]) -> Build:
    """``F.layer_norm`` in a module of its own, called by ``change``."""
    return own(change)


def ln(m: Any, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], m.gain, m.b, eps)


def norm(size: Size) -> nn.Module:
    return nn.LayerNorm(size.width)


NORMS: dict[str, Build] = {
    "layer_norm": norm,
    "no_affine": lambda s: nn.LayerNorm(s.width, elementwise_affine=False),
    "no_bias": lambda s: nn.LayerNorm(s.width, bias=False),
    "large_eps": lambda s: nn.LayerNorm(s.width, eps=0.1),
    "functional": own(ln),
    "weight_plus_one": own(lambda m, x: F.layer_norm(x, x.shape[-1:], m.gain + 1, m.b)),
    "weight_float": own(lambda m, x: F.layer_norm(x, x.shape[-1:], m.gain.to(x.dtype), m.b.type_as(x))),
    "by_hand": own(lambda m, x: m.gain * _by_hand(m, x), bias=False),
    "by_hand_bias": own(lambda m, x: m.gain * _by_hand(m, x) + m.b),
    "by_hand_plain": simple(lambda x: _by_hand(None, x)),
    "by_hand_divided": own(_divided),
    "by_hand_plus_one": own(lambda m, x: _by_hand(m, x) * (1 + m.gain) + m.b),
    "by_hand_cast": own(lambda m, x: (m.gain * _by_hand(m, x.double())).to(x.dtype), bias=False),
    "by_hand_image": lambda s: _imaged(
        Op(
            lambda m, x: m.gain[:, None, None] * _by_hand(m, x, 1) + m.b[:, None, None],
            gain=param(s.width),
            b=param(s.width),
        )
    ),
    "image": lambda s: _imaged(
        Op(lambda m, x: ln(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), gain=param(s.width), b=param(s.width))
    ),
    "transposed": lambda s: Op(
        lambda m, x: turn(m.n(turn(x))),
        n=Op(lambda m, x: ln(m, turn(x)).transpose(-1, -2), gain=param(s.width), b=param(s.width)),
    ),
    "twice": lambda s: Op(lambda m, x: m.n(m.n(x)), n=norm(s)),
    "summed": lambda s: Op(lambda m, x: m.n(x) + m.k(x), n=norm(s), k=norm(s)),
    "nested": lambda s: Op(lambda m, x: m.n(x), n=nn.Sequential(nn.Identity(), norm(s))),
    "same_parameter": own(lambda m, x: F.layer_norm(x, x.shape[-1:], m.gain, m.gain), bias=False),
    "moved_axis": own(lambda m, x: ln(m, x.transpose(0, 1)).transpose(0, 1)),
    # norms that do more than normalise, or something else
    "doubled_inside": called(lambda m, x: 2 * ln(m, x)),
    "halved_before": called(lambda m, x: ln(m, x * 0.5, 0.1)),
    "negated_inside": called(lambda m, x: -ln(m, x)),
    "rolled_inside": called(lambda m, x: ln(m, x.roll(1, 1))),
    "flipped_inside": called(lambda m, x: ln(m, x).flip(1)),
    "batch_moved": exact(called(lambda m, x: ln(m, x.transpose(0, 1)).reshape(x.shape))),
    "meaned_inside": called(lambda m, x: ln(m, x.mean(1, keepdim=True)).expand_as(x)),
    "masked_inside": called(lambda m, x: ln(m, x.masked_fill(x.new_ones(x.shape[1], 1).tril() > 2, 0.0))),
    "bias_plus_one": own(lambda m, x: F.layer_norm(x, x.shape[-1:], m.gain, m.b + 1)),
    "weight_alpha": own(lambda m, x: F.layer_norm(x, x.shape[-1:], torch.add(m.gain, 1, alpha=2), m.b)),
    "weight_flipped": own(lambda m, x: F.layer_norm(x, x.shape[-1:], m.gain.flip(0), m.b)),
    "weight_scaled": own(lambda m, x: F.layer_norm(x, x.shape[-1:], 2 * m.gain, m.b)),
    "gain_after": called(lambda m, x: ln(m, x) * m.gain),
    "bias_after": called(lambda m, x: ln(m, x) + m.b),
    "bias_first": own(lambda m, x: (_by_hand(m, x) + m.b) * m.gain),
    "bias_subtracted": own(lambda m, x: _by_hand(m, x) * m.gain - m.b),
    "bias_alpha": own(lambda m, x: torch.add(_by_hand(m, x) * m.gain, m.b, alpha=3)),
    "eps_alpha": own(
        lambda m, x: (
            lambda c: c * torch.rsqrt(torch.add(c.pow(2).mean(-1, keepdim=True), 0.1, alpha=3)) * m.gain + m.b
        )(x - x.mean(-1, keepdim=True))
    ),
    "sub_alpha": own(_alpha),
    "population": own(_population),
    "uncentred_variance": own(_uncentred_variance),
    "moments": own(_moments),
    "var_mean": own(_var_mean),
    "length": own(_length),
    "std": own(lambda m, x: _spread(m, x, False, 0.0)),
    "std_outside": own(lambda m, x: _spread(m, x, False, 1e-3)),
    "unbiased": own(lambda m, x: _spread(m, x, True, 0.0)),
    "gain_by_token": lambda s: Op(lambda m, x: m.gain * _by_hand(m, x), gain=param(s.fix(), s.width)),
    "gain_scalar": lambda s: Op(lambda m, x: m.gain * _by_hand(m, x), gain=param(1)),
    "gain_dynamic": lambda s: Op(
        lambda m, x: ln(m, x) * m.g(ln(m, x)).sigmoid(), gain=param(s.width), b=param(s.width), g=linear(s)
    ),
    "over_tokens": lambda s: Op(lambda m, x: turn(m.n(turn(x))), n=nn.LayerNorm(s.fix())),
    "over_tokens_by_hand": lambda s: Op(
        lambda m, x: _by_hand(m, x, 1) * m.gain + m.b, gain=param(s.width), b=param(s.width)
    ),
    "over_both": lambda s: nn.LayerNorm((s.fix(), s.width)),
    "side_by_side": lambda s: Op(
        lambda m, x: m.w(m.n(torch.cat([x.flip(1), x], dim=-1))),
        n=nn.LayerNorm(2 * s.width),
        w=nn.Linear(2 * s.width, s.width),
    ),
    "over_half": lambda s: Op(lambda m, x: m.n(x.unflatten(-1, (2, -1))).flatten(2), n=nn.LayerNorm(s.width // 2)),
    "group_norm": lambda s: Op(lambda m, x: turn(m.n(turn(x))), n=nn.GroupNorm(1, s.width)),
    "group_norm_each": lambda s: Op(lambda m, x: turn(m.n(turn(x))), n=nn.GroupNorm(s.width, s.width)),
    "rms_norm": lambda s: nn.RMSNorm(s.width),
    "rms_by_hand": own(lambda m, x: m.gain * _rms(m, x), bias=False),
    "rms_by_hand_bias": own(lambda m, x: m.gain * _rms(m, x) + m.b),
    "rms_plus_one": own(lambda m, x: _rms(m, x, 0.1) * (1 + m.gain), bias=False),
    "rms_divided": own(lambda m, x: m.gain * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)), bias=False),
    "rms_power": own(lambda m, x: m.gain * (x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5)), bias=False),
    "rms_cast": own(lambda m, x: m.gain * x * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5), bias=False),
    "rms_seen": own(_rms_seen),
    "rms_of_another": own(
        lambda m, x: m.gain * x.roll(1, -1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), bias=False
    ),
    "rms_of_tokens": own(lambda m, x: m.gain * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), bias=False),
    "centred_beside": own(lambda m, x: ln(m, x) + (x - x.mean(-1, keepdim=True))),
    "batch_norm": lambda s: Op(lambda m, x: turn(m.n(turn(x))), n=nn.BatchNorm1d(s.width)),
    "tanh": own(lambda m, x: torch.tanh(m.gain[0] * x) * m.gain + m.b),
    "centred": simple(lambda x: x - x.mean(-1, keepdim=True)),
    "centred_half": simple(lambda x: x - 0.5 * x.mean(-1, keepdim=True)),
    "none": lambda s: nn.Identity(),
}
"""Stream (batch, tokens, width) -> what a branch reads, same shape."""


def _imaged(inner: nn.Module) -> nn.Module:
    return Op(lambda m, x: rows(m.n(image(x))), n=inner)


FEATURES: dict[str, Build] = {
    "norm": norm,
    "pooled_norm": lambda s: Op(lambda m, x: m.n(x.mean(1)), n=norm(s)),
    "first_norm": lambda s: Op(lambda m, x: m.n(x[:, 0]), n=norm(s)),
    "normed_mean": lambda s: Op(lambda m, x: m.n(x).mean(1), n=norm(s)),
    "centred": simple(lambda x: x - x.mean(-1, keepdim=True)),
    "logits_norm": lambda s: Op(lambda m, x: m.k(m.l(m.n(x))), n=norm(s), l=linear(s, 5), k=nn.LayerNorm(5)),
    "zero": simple(lambda x: torch.zeros_like(x[..., :1])),
    "inner_norm": lambda s: Op(lambda m, x: m.k(m.l(m.n(x))), n=norm(s), l=linear(s), k=norm(s)),
}
"""Features that see a stream through norms only."""


def _mask(m: Any, x: Tensor) -> Tensor:
    """The stream is added to attention scores: rows against as many keys as there are channels."""
    h = m.n(x)
    keys = h[:, :1].expand(-1, x.shape[2], -1)
    return F.scaled_dot_product_attention(
        h, keys, keys * torch.arange(x.shape[2], device=x.device)[:, None], attn_mask=x
    )


def _mask_turned(m: Any, x: Tensor) -> Tensor:
    h = m.n(x)
    return F.scaled_dot_product_attention(h, h, h, attn_mask=turn(x))


LEAKS: dict[str, Build] = {
    "returned": lambda s: nn.Identity(),
    "returned_first": simple(lambda x: x[:, 0]),
    "returned_doubled": simple(lambda x: 2 * x),
    "linear": linear,
    "linear_one": lambda s: linear(s, 1),
    "conv": lambda s: Op(lambda m, x: m.l(turn(x)), l=nn.Conv1d(s.width, 2, 1)),
    "matmul": lambda s: Op(lambda m, x: x @ m.w, w=param(s.width, 3)),
    "einsum": lambda s: Op(lambda m, x: torch.einsum("btd,dk->btk", x, m.w), w=param(s.width, 3)),
    "dot": lambda s: Op(lambda m, x: x @ m.w, w=param(s.width)),
    "vector_linear": lambda s: Op(lambda m, x: F.linear(x, m.w), w=param(s.width)),
    "softmax_scaled": simple(lambda x: (x * torch.arange(x.shape[-1], device=x.device)).softmax(-1)),
    "max": simple(lambda x: x.max(-1).values),
    "amax": simple(lambda x: x.amax(-1)),
    "min_max": simple(lambda x: x.aminmax(dim=-1).min),
    "max_tokens": simple(lambda x: x.amax(1)),
    "mean": simple(lambda x: x.mean(-1)),
    "mean_kept": simple(lambda x: x.mean(-1, keepdim=True)),
    "mean_all": simple(lambda x: x.mean()),
    "mean_none": simple(lambda x: x.mean(dim=[])),
    "sum": simple(lambda x: x.sum(-1)),
    "sum_two": simple(lambda x: x.sum((1, 2))),
    "sub_alpha": simple(lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2)),
    "mean_other": simple(lambda x: x - x.flip(1).mean(-1, keepdim=True)),
    "mean_of_all": simple(lambda x: x - x.mean((1, 2), keepdim=True)),
    "var_uncentred": simple(lambda x: x.pow(2).mean(-1)),
    "norm2": simple(lambda x: x.norm(dim=-1)),
    "normalised": simple(lambda x: F.normalize(x, dim=-1)),
    "cumsum": simple(lambda x: x.cumsum(-1)),
    "channels": simple(lambda x: x[..., :2]),
    "channel": simple(lambda x: x[..., 0]),
    "channel_index": simple(lambda x: x[..., torch.arange(2, device=x.device)]),
    "channel_select": simple(lambda x: x.index_select(2, torch.zeros(1, dtype=torch.long, device=x.device))),
    "channel_gather": simple(
        lambda x: x.gather(2, torch.zeros(x.shape[0], x.shape[1], 1, dtype=torch.long, device=x.device))
    ),
    "channel_take": simple(lambda x: x.flatten().take(torch.arange(3, device=x.device))),
    "channel_split": simple(lambda x: x.split([1, x.shape[-1] - 1], -1)[0]),
    "channel_unbind": simple(lambda x: x.unbind(-1)[1]),
    "channel_unfold": simple(lambda x: x.unfold(-1, 2, 1)),
    "heads_norm": lambda s: Op(lambda m, x: m.n(x.unflatten(-1, (2, -1))), n=nn.LayerNorm(s.width // 2)),
    "heads_sum": simple(lambda x: x.unflatten(-1, (2, -1)).sum(-1)),
    "heads_dot": simple(lambda x: x.unflatten(-1, (2, -1)) @ x.unflatten(-1, (2, -1)).transpose(-1, -2)),
    "square": simple(lambda x: x * x),
    "power": simple(lambda x: x.pow(2)),
    "gram": simple(lambda x: x @ turn(x)),
    "gram_tokens": simple(lambda x: turn(x) @ x),
    "self_einsum": simple(lambda x: torch.einsum("btd,bsd->bts", x, x)),
    "normed_dot": lambda s: Op(lambda m, x: (m.n(x) * x).sum(-1), n=norm(s)),
    "query": lambda s: Op(lambda m, x: (lambda h: F.scaled_dot_product_attention(x, h, h))(m.n(x).abs()), n=norm(s)),
    "mask": lambda s: Op(_mask, n=norm(s)),
    "mask_turned": lambda s: Op(_mask_turned if s.tokens == s.width else _mask, n=norm(s)),
    "sign": simple(lambda x: (x > 0).to(x.dtype)),
    "compared": simple(lambda x: torch.where(x > x.flip(1), 1.0, 0.0)),
    "counted": simple(lambda x: (x > 0).sum(-1)),
    "argmax_bias": simple(lambda x: (x + torch.arange(x.shape[-1], device=x.device) * x.abs()).argmax(-1)),
    "sorted": simple(lambda x: x.sort(-1).values),
    "topk": simple(lambda x: x.topk(1, -1).values),
    "median": simple(lambda x: x.median(-1).values),
    "fourier": simple(lambda x: torch.fft.rfft(x, dim=-1).abs()),
    "fourier_tokens": simple(lambda x: torch.fft.rfft(x, dim=1).abs()),
    "logsumexp": simple(lambda x: x.logsumexp(-1)),
    "product": simple(lambda x: x.prod(-1)),
    "rolled": simple(lambda x: x.roll(1, -1)),
    "flipped": simple(lambda x: x.flip(-1)),
    "gelu": simple(F.gelu),
    "sigmoid_mean": simple(lambda x: x.sigmoid().mean(-1)),
    "pooled_channels": simple(lambda x: F.avg_pool1d(x, 2)),
    "adaptive_channels": simple(lambda x: F.adaptive_avg_pool1d(x, 2)),
    "interpolated": simple(lambda x: F.interpolate(x, size=3, mode="linear")),
    "padded": simple(lambda x: F.pad(x, (1, 1))),
    "shuffled": simple(
        lambda x: F.pixel_shuffle(turn(x).reshape(x.shape[0], x.shape[2] // 4, 4, -1).flatten(1, 2).unsqueeze(-1), 2)
    ),
    "constant_pad": simple(lambda x: F.pad(x, (0, 1), value=2.0)),
    "dynamic_weight": lambda s: Op(lambda m, x: F.layer_norm(m.n(x), x.shape[-1:], x[0, 0]), n=norm(s)),
    "dynamic_linear": lambda s: Op(lambda m, x: m.n(x)[0] @ turn(x[0]), n=norm(s)),
    "dynamic_bias": lambda s: Op(lambda m, x: F.linear(m.n(x), m.w, x[0, 0]), n=norm(s), w=param(s.width, s.width)),
    "dynamic_kernel": lambda s: Op(lambda m, x: F.conv1d(m.n(x).transpose(-1, -2), turn(x[:1])), n=norm(s)),
    "dynamic_table": simple(lambda x: F.embedding(torch.zeros(2, 2, dtype=torch.long, device=x.device), x[0])),
    "rms_norm": lambda s: nn.RMSNorm(s.width),
    "group_norm": lambda s: Op(lambda m, x: m.n(turn(x)), n=nn.GroupNorm(2, s.width)),
    "norm_two_axes": lambda s: Op(lambda m, x: m.n(x), n=nn.LayerNorm((s.fix(), s.width))),
    "norm_tokens": lambda s: Op(lambda m, x: m.n(turn(x)), n=nn.LayerNorm(s.fix())),
    "norm_doubled": lambda s: Op(lambda m, x: m.n(torch.cat([x, x * 2], -1)), n=nn.LayerNorm(2 * s.width)),
    "norm_neighbours": lambda s: Op(lambda m, x: m.n(torch.cat([x, x.flip(1)], -1)), n=nn.LayerNorm(2 * s.width)),
    "norm_padded": lambda s: Op(lambda m, x: m.n(F.pad(x, (0, 1))), n=nn.LayerNorm(s.width + 1)),
    "norm_turned": lambda s: Op(lambda m, x: m.n(turn(x)), n=nn.LayerNorm(s.fix())),
    "norm_reshaped": exact(lambda s: Op(lambda m, x: m.n(turn(x).reshape(x.shape)), n=norm(s))),
    "norm_squared": lambda s: Op(lambda m, x: m.n(x * x), n=norm(s)),
    "norm_cut": lambda s: Op(lambda m, x: m.n(x[..., 1:]), n=nn.LayerNorm(s.width - 1)),
    "bitcast": simple(lambda x: x.contiguous().view(torch.int64) >> 40),
    "bilinear": lambda s: Op(lambda m, x: m.l(x, m.n(x)), l=nn.Bilinear(s.width, s.width, 2), n=norm(s)),
    "gru": lambda s: Op(lambda m, x: m.l(x)[0], l=nn.GRU(s.width, 2, batch_first=True)),
    "distance": simple(lambda x: torch.cdist(x, 2 * x)),
}
"""Features that see a stream's mean, or might: norms of the stream have to stay."""
