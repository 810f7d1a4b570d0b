"""Softmax attention fades into linear attention (SLAB, arXiv 2405.11582): which modules' it is, and how they learn.

    o = λ softmax(q k^T s) v + (1-λ) linear(q, k, v),   λ: 1 -> 0

As long as λ > 0 each layer also learns by itself that its linear attention gives what its softmax attention gives, from
the same queries, keys and values: |linear - softmax|² / |softmax|². That comes first, with λ = 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.analysis.attention_costs import crossing, gain
from normconvert.analysis.attentions import Attention
from normconvert.errors import InputError
from normconvert.runtime import LinearAttention, take_over


class BlendedAttention(LinearAttention):
    """See the module's text. With λ = 0 it is the class that it derives from."""

    mix: Tensor

    def __init__(self, site: Attention, like: Tensor, *, convolution: bool = True) -> None:
        super().__init__(site.heads, site.size, site.grid, site.prefix, like=like)
        self.register_buffer("mix", torch.ones((), device=like.device))
        self.error: Tensor | None = None
        # Softmax attention has no convolution: at first, and if there shall be none, this one does nothing.
        for parameter in self.conv.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(convolution)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """λ of one and 1-λ of the other; in training :attr:`error` is what one is from the other."""
        linear = super().forward(query, key, value, *args, **kwargs)
        if not self.mix > 0:
            return linear
        softmax = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        if self.training:
            wanted = softmax.detach().float()
            self.error = (linear.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
        mix = self.mix.to(linear.dtype)
        return mix * softmax + (1 - mix) * linear

    def set_mix(self, value: float) -> None:
        """Set λ."""
        self.mix.fill_(value)

    def take_error(self) -> Tensor | None:
        """The last error, once: or the graph of its batch would live on."""
        error, self.error = self.error, None
        return error


def blend(model: nn.Module, sites: Sequence[Attention], *, convolution: bool = True) -> dict[str, BlendedAttention]:
    """Let the attention of a model fade into a linear one, in place; path of each module -> its new child."""
    found = {}
    for site in sites:
        module = model.get_submodule(site.path)
        like = next(p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point())
        found[site.path] = BlendedAttention(site, like, convolution=convolution)
        take_over(module, found[site.path])
    return found


def choose_attentions(
    found: Sequence[Attention], patterns: Sequence[str]
) -> tuple[tuple[Attention, ...], dict[str, str]]:
    """The attention to swap, and the path of what stays -> why, one sentence.

    Args:
        found: all of the model.
        patterns: globs; those that match are swapped whether they gain or not; none: those that gain.

    Raises:
        InputError: a glob matches nothing; the message lists the nearest paths.
    """
    paths = [one.path for one in found]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise InputError(f"--attention {pattern!r} matches none; the nearest are {', '.join(near) or '(none)'}")
    chosen, left = [], {}
    for one in found:
        named = any(fnmatchcase(one.path, pattern) for pattern in patterns)
        reason = f"{one.obstacle}." if one.obstacle else "" if named else _loss(one, bool(patterns))
        if reason:
            left[one.path] = reason
        else:
            chosen.append(one)
    return tuple(chosen), left


def _loss(one: Attention, others_named: bool) -> str:
    """Why an attention that could be linear is not; empty if it gains."""
    if others_named:
        return "it is not among --attention."
    if gain(one.heads, one.tokens, one.size) >= 1:
        return ""
    least = crossing(one.heads, one.size)
    return (
        f"it has {one.tokens} tokens, and a linear one would not be faster with fewer than about {least} (one image, "
        "on a CPU); --attention swaps it all the same."
    )
