"""What a user may choose about a conversion, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError

METHODS: Mapping[str, str] = {"rmsnorm": "LayerNorm", "fuse-bn": "BatchNorm"}
"""Conversion -> the norm that it looks for, in words."""

CHOICES: Mapping[str, tuple[str, ...]] = {"tied": ("center", "untie")}
"""Option -> what it may be."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""How weights may be stored; ``auto`` is each tensor's own."""


@dataclass(frozen=True)
class Options:
    """What the user allows. An option that a method does not know has no effect there.

    Attributes:
        tied: ``center`` centres the output of an embedding that is also the output head; ``untie`` centres a copy.
        min_gain: how many norms a centring operation must win.
        allow_shifted_outputs: the per-token mean of returned hidden states may change.
        fold: move the norms' weight and bias into the linear maps that read them.
        merge_branches: with BatchNorms, make parallel convolutions and skips of a block one convolution.
    """

    tied: str = "center"
    min_gain: int = 3
    allow_shifted_outputs: bool = False
    fold: bool = False
    merge_branches: bool = False

    def check(self) -> None:
        """Raise InputError if one of them has a value that it cannot have."""
        for name, allowed in CHOICES.items():
            value: Any = getattr(self, name)
            if value not in allowed:
                raise InputError(f"unknown value {value!r} for {name}; expected {' or '.join(allowed)}")
        if self.min_gain < 1:
            raise InputError(f"min_gain is {self.min_gain}; expected 1 or more")


def check_method(method: str) -> None:
    """Raise InputError unless there is such a conversion."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
