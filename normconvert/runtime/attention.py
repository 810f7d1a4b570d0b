"""Simplified linear attention (SLAB, arXiv 2405.11582, eq. 6 and 7; the authors' code: xinghaochen/SLAB).

    o_i = relu(q_i) sum_j k'_j v_j^T / (relu(q_i) sum_j k'_j + 1e-6) + DWC(v)_i,    k'_j = relu(k_j + p_j)

with learnt positions p, and DWC a depthwise 5x5 convolution over v, laid out as the H x W grid that the tokens come
from, one set of kernels for all heads. Tokens before the grid (class, registers) are attended to and not convolved.
The scale of softmax attention drops out: it is in numerator and denominator.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from normconvert.runtime.kernels import is_plain, wide_dtype
from normconvert.runtime.modules import Derived, derive, get_module

LEAST = 1e-6
"""Added to the denominator, so that a query without any positive entry attends to nothing."""
NO_MASK = "this attention was swapped for a linear one, which takes no mask"
CHILD = "linear_attention"
"""Name of the child that a module whose attention was swapped gains."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, pairs_first: bool | None = None) -> Tensor:
    """(q k^T v) / (q sum(k) + 1e-6), where q and k are not negative.

    Args:
        q: (..., tokens, size).
        k: likewise.
        v: (..., tokens, values).
        pairs_first: multiply (q k^T) v, not q (k^T v); None: whichever takes fewer operations.

    Returns:
        (..., tokens, values), in the dtype of v; accumulated in float32, float64 in float64.
    """
    dtype = wide_dtype(v)
    if v.device.type != "meta" and torch.is_autocast_enabled(v.device.type):
        with torch.autocast(v.device.type, enabled=False):  # its products would be of 16 bits
            return _quotient(q.to(dtype), k.to(dtype), v.to(dtype), pairs_first).to(v.dtype)
    return _quotient(q.to(dtype), k.to(dtype), v.to(dtype), pairs_first).to(v.dtype)


def _quotient(q: Tensor, k: Tensor, v: Tensor, pairs_first: bool | None) -> Tensor:
    if pairs_first is None:
        # tokens^2 (size + values) operations against 2 tokens size values
        pairs_first = k.shape[-2] * (k.shape[-1] + v.shape[-1]) < 2 * k.shape[-1] * v.shape[-1]
    divisor = q @ k.sum(-2).unsqueeze(-1) + LEAST
    transposed = k.transpose(-1, -2)
    return (q @ transposed @ v if pairs_first else q @ (transposed @ v)) / divisor


def _if_unmasked(value: Tensor, mask: Tensor) -> Tensor:
    """``value``, if the mask hides nothing.

    transformers makes such masks when a model is exported, where eager calls have none. A graph does not know a mask's
    values and cannot raise: what it computes with any other mask is infinite or no number.
    """
    shown = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    if is_compiling() or mask.is_meta or not is_plain(value, mask):
        return torch.where(shown, value, torch.inf)
    if not shown:
        raise ValueError(NO_MASK)
    return value


class LinearAttention(nn.Module):
    """What takes the place of one call of scaled_dot_product_attention: see the module's text.

    Args:
        heads: of queries, keys and values.
        size: channels a head.
        grid: height and width of the grid that the tokens are, row by row.
        prefix: tokens before those of the grid.
        kernel: edge of the convolution's kernels, an odd number.
        like: a tensor whose device and dtype the parameters have.

    Raises:
        ValueError: the grid is no rectangle.
    """

    def __init__(
        self,
        heads: int,
        size: int,
        grid: Sequence[int],
        prefix: int = 0,
        kernel: int = 5,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"linear attention: {list(grid)} is no rectangle of tokens, height and width")
        if kernel % 2 == 0:
            raise ValueError(f"linear attention: a kernel of {kernel} has no middle; expected an odd number")
        self.heads, self.size, self.grid, self.prefix = heads, size, (grid[0], grid[1]), prefix
        self.tokens = prefix + grid[0] * grid[1]
        like = torch.empty(0) if like is None else like
        self.positions = nn.Parameter(like.new_zeros(heads, self.tokens, size))
        self.conv = nn.Conv2d(
            size, size, kernel, padding=kernel // 2, groups=size, device=like.device, dtype=like.dtype
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.heads}, {self.size}, grid={self.grid}, prefix={self.prefix}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As scaled_dot_product_attention of (batch, heads, tokens, size), without a mask, dropout or a scale.

        Raises:
            ValueError: a mask that hides something or dropout is asked for, or the tokens are not those of the grid.
        """
        if is_causal:
            raise ValueError(NO_MASK)
        if dropout_p:
            raise ValueError(
                "this attention was swapped for a linear one, which has no weights to drop: set its dropout to 0"
            )
        expected = (self.heads, self.tokens, self.size)
        for given in (query, key, value):
            if given.ndim != 4 or tuple(given.shape[1:]) != expected:
                raise ValueError(
                    f"this attention was swapped for a linear one, which takes {self.heads} heads of {self.tokens} "
                    f"tokens ({self.prefix} + {self.grid[0]}x{self.grid[1]}) of {self.size} channels, not "
                    f"{tuple(given.shape[1:])}: give images of the size that the model was swapped for"
                )
        value = value if attn_mask is None else _if_unmasked(value, attn_mask)
        attended = linear_attention(query.relu(), (key + self.positions).relu(), value)
        return attended + self._convolved(value)

    def _convolved(self, value: Tensor) -> Tensor:
        """The convolution over the grid; zeros for the tokens before it."""
        grid = value[:, :, self.prefix :].transpose(-1, -2).reshape(-1, self.size, *self.grid)
        rows = self.conv(grid).reshape(-1, self.heads, self.size, self.grid[0] * self.grid[1]).transpose(-1, -2)
        return F.pad(rows, (0, 0, self.prefix, 0)) if self.prefix else rows


class _Taking(TorchFunctionMode):
    """Hands calls of scaled_dot_product_attention to another function, and counts them.

    The call stands in library code, inside a module's forward; here eager calls, exporters and compilers all see it.
    """

    def __init__(self, instead: Any) -> None:
        super().__init__()
        self.instead, self.calls = instead, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer one call of torch."""
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self.instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Attending(Derived):
    """Before the own class of a module whose forward gets its child's result for softmax attention's.

    Its forward raises a RuntimeError if that of the own class does not call scaled_dot_product_attention just once, as
    another implementation of attention may. Nothing of the module is lost or renamed.
    """

    @classmethod
    def members(cls, kind: Any, *settings: Any) -> dict[str, Any]:
        """The forward."""

        @functools.wraps(kind.forward)  # hooks and libraries ask for the names of its arguments
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            taking = _Taking(getattr(self, CHILD))
            with taking:  # `as` would give compilers something else
                result = kind.forward(self, *args, **kwargs)
            if taking.calls != 1:
                raise RuntimeError(
                    f"the attention of this {kind.__name__} was swapped for a linear one, but its forward calls "
                    f"scaled_dot_product_attention {taking.calls} times, not once: load it with "
                    "attn_implementation='sdpa' (transformers), or with fused attention (timm)"
                )
            return result

        return {"forward": forward}


def attend(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Let a module's attention be linear; its parameters are new.

    Raises:
        ValueError: the module's attention has been swapped already, or it has a child of that name.
    """
    module = get_module(model, edit["path"])
    if hasattr(module, CHILD):
        raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) has a {CHILD} already")
    sample = next((p for p in module.parameters() if p.is_floating_point()), None)
    new = LinearAttention(int(edit["heads"]), int(edit["size"]), edit["grid"], int(edit.get("prefix", 0)), like=sample)
    take_over(module, new)


def take_over(module: nn.Module, new: nn.Module) -> None:
    """Let ``new`` answer the one call of scaled_dot_product_attention in a module's forward, as its child."""
    module.add_module(CHILD, new.train(module.training))
    module.__class__ = derive(type(module), Attending)
