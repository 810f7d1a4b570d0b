"""What a user may choose about a conversion, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from normconvert.errors import InputError

METHODS: Mapping[str, str] = {"rmsnorm": "LayerNorm", "crmsnorm": "LayerNorm", "fuse-bn": "BatchNorm"}
"""Conversion -> the norm that it looks for, in words."""

CHOICES: Mapping[str, tuple[str, ...]] = {"tied": ("center", "untie"), "basis": ("paper", "isometric")}
"""Option -> what it may be."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""How weights may be stored; ``auto`` is each tensor's own."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"crmsnorm": {"tied": "untie", "min_gain": 2}}
"""Conversion -> what its options are if the user does not say, where that differs from the general default."""


@dataclass(frozen=True)
class Options:
    """What the user allows. An option that a method does not know has no effect there.

    Attributes:
        tied: ``center`` centres the output of an embedding that is also the output head; ``untie`` centres a copy.
            If left out, ``center``, and ``untie`` for crmsnorm.
        min_gain: how many norms a centring operation must win; if left out 3, and 2 for crmsnorm.
        allow_shifted_outputs: the per-token mean of returned hidden states may change.
        fold: move the norms' weight and bias into the linear maps that read them.
        merge_branches: with BatchNorms, make parallel convolutions and skips of a block one convolution.
        basis: how crmsnorm stores d - 1 numbers: ``paper`` drops a channel, ``isometric`` is an orthogonal basis.
    """

    tied: str | None = None
    min_gain: int | None = None
    allow_shifted_outputs: bool = False
    fold: bool = False
    merge_branches: bool = False
    basis: str = "isometric"

    def for_method(self, method: str) -> Options:
        """The same, with the method's own defaults for what the user left open."""
        general: dict[str, Any] = {"tied": "center", "min_gain": 3, **DEFAULTS.get(method, {})}
        return replace(self, **{name: value for name, value in general.items() if getattr(self, name) is None})

    def check(self) -> None:
        """Raise InputError if one of them has a value that it cannot have."""
        for name, allowed in CHOICES.items():
            value: Any = getattr(self, name)
            if value is not None and value not in allowed:
                raise InputError(f"unknown value {value!r} for {name}; expected {' or '.join(allowed)}")
        if self.min_gain is not None and self.min_gain < 1:
            raise InputError(f"min_gain is {self.min_gain}; expected 1 or more")


def check_method(method: str) -> None:
    """Raise InputError unless there is such a conversion."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")


def check_device(device: str) -> None:
    """Refuse a device that is not there, before any work is done.

    Raises:
        InputError: torch does not know it, or cannot use it here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here: {reason}") from error
