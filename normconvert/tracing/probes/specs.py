"""What one input looks like: a `Spec` becomes a meta tensor to trace with or a CPU tensor to compute with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """One model input.

    Attributes:
        shape: the tensor's shape.
        kind: a row of :data:`FILLS`, how values are drawn.
        low, high: the range of integers, ``high`` excluded.
        tokens: token id -> how many of it every row of an ``ids`` input must hold, from position 1 on (placeholders
            that a model replaces by image or audio features).
        value: the values of a ``given`` input, as nested lists.
    """

    shape: tuple[int, ...]
    kind: str
    low: int = 0
    high: int = 2
    tokens: dict[int, int] = field(default_factory=dict)
    value: Any = None


def _ids(spec: Spec, generator: torch.Generator) -> Tensor:
    ids = torch.randint(spec.low, max(spec.high, spec.low + 1), spec.shape, generator=generator)
    return place_tokens(ids, spec)


def place_tokens(ids: Tensor, spec: Spec) -> Tensor:
    """Put the placeholders where `spec` wants them, and nowhere else (ids: int64, last axis is the sequence)."""
    for token in spec.tokens:
        ids = torch.where(ids == token, torch.full_like(ids, spec.low if spec.low != token else spec.low + 1), ids)
    start = 1
    for token, count in spec.tokens.items():
        ids[..., start : start + count] = token
        start += count
    return ids


def _boxes(spec: Spec, generator: torch.Generator) -> Tensor:
    """Integer boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1."""
    corners = torch.randint(spec.low, spec.high, (*spec.shape[:-1], 2, 2), generator=generator)
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


# kind -> CPU values. ``float`` kinds are float32 and are cast to the model's dtype where the model is run.
FILLS: dict[str, Callable[[Spec, torch.Generator], Tensor]] = {
    "ids": _ids,
    "int": lambda spec, g: torch.randint(spec.low, max(spec.high, spec.low + 1), spec.shape, generator=g),
    "image": lambda spec, g: torch.randn(spec.shape, generator=g),
    "audio": lambda spec, g: torch.randn(spec.shape, generator=g),
    "float": lambda spec, g: torch.randn(spec.shape, generator=g),
    "positive": lambda spec, g: torch.rand(spec.shape, generator=g),
    "boxes": _boxes,
    "ones": lambda spec, g: torch.ones(spec.shape, dtype=torch.int64),
    "zeros": lambda spec, g: torch.zeros(spec.shape, dtype=torch.int64),
    "true": lambda spec, g: torch.ones(spec.shape, dtype=torch.bool),
    "false": lambda spec, g: torch.zeros(spec.shape, dtype=torch.bool),
    "given": lambda spec, g: torch.tensor(spec.value),
}

SIGNALS = frozenset({"image", "audio", "float"})
"""The kinds whose scale a probe may vary."""


def materialise(spec: Spec, generator: torch.Generator) -> Tensor:
    """The input's values on the CPU (integers int64, signals float32)."""
    return FILLS[spec.kind](spec, generator)
