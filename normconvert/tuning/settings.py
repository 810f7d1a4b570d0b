"""What a user chooses about a swap, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from normconvert.errors import InputError

SWAPS: Mapping[str, str] = {
    "un": "Unified Normalization",
    "repbn": "RepBN",
    "powernorm": "PowerNorm",
    "ln-free": "no norm: LayerNorm with a frozen divisor",
}
"""Method -> what it is, in words."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "method": tuple(SWAPS),
    "objective": ("distill", "task"),
    "schedule": ("linear", "cosine", "none"),
    "mixed_precision": ("no", "bf16"),
}
MAY_CHANGE = frozenset({"max_minutes", "eval_data", "batches_between_checkpoints"})
"""Settings that a resumed run may change: they do not touch what is learnt."""


@dataclass(frozen=True)
class Settings:
    """How norms are swapped.

    Attributes:
        method: one of :data:`SWAPS`.
        data: what to learn from, ``KIND:WHERE``.
        eval_data: what to measure accuracy or perplexity on; None: data's own held-out part, if it has one.
        objective: ``distill`` from the original, or ``task``: the model's own loss on labelled data.
        norms: globs of module paths; empty: all.
        schedule: how λ falls and norms are removed over the first half of the steps; ``none``: all at once.
        steps: optimiser steps; 0: calibrate only.
        batch_size: examples a step and process.
        accumulate: batches a step.
        lr: peak learning rate of AdamW.
        seed: of the order of the examples and their augmentation.
        length: tokens an example of text; None: what the model takes, at most 256.
        calibration: examples for the first statistics.
        feature_weight: of the match of features, block by block, beside the match of logits.
        spread_weight: of the loss that makes tokens equally long before the last norm goes (ln-free).
        window: batches whose statistics are smoothed (un); 1: no smoothing.
        filtration: leave outlier batches out of the statistics (un).
        mixed_precision: ``bf16`` runs the networks in bfloat16 where that is safe. There is no fp16: it scales the
            loss by a changing factor, and with it the gradient statistics that un and powernorm keep.
        max_minutes: end earlier; the schedule is then that of the time. Such a run cannot be repeated exactly.
        batches_between_checkpoints: 0: none.
    """

    method: str
    data: str
    eval_data: str | None = None
    objective: str = "distill"
    norms: tuple[str, ...] = ()
    schedule: str = "linear"
    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    seed: int = 0
    length: int | None = None
    calibration: int = 256
    feature_weight: float = 1.0
    spread_weight: float = 0.1
    window: int = 4
    filtration: bool = True
    mixed_precision: str = "no"
    max_minutes: float | None = None
    batches_between_checkpoints: int = 500

    def check(self) -> None:
        """Raise InputError if one of them has a value that it cannot have."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"unknown value {value!r} for {name}; expected {', '.join(allowed)}")
        least = {"steps": 0, "batch_size": 1, "accumulate": 1, "calibration": 1, "window": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; expected {low} or more")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr is {self.lr}; expected a positive number")
        if self.length is not None and self.length < 2:
            raise InputError(f"length is {self.length}; expected 2 or more tokens")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(f"max_minutes is {self.max_minutes}; expected a positive number")

    def norm_options(self) -> dict[str, Any]:
        """Further arguments of the training norm."""
        if self.method == "un":
            # calibration has done what warm-up is for: plain statistics for one window are enough
            return {"window": self.window, "filtration": self.filtration, "warmup": self.steps // 20}
        if self.method == "powernorm":
            return {"warmup": 0}
        return {}

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self) | {"norms": list(self.norms)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What keeps a run with ``other`` settings from being resumed with these, one clause each."""
        mine = self.to_json()
        names = [f.name for f in fields(self) if f.name not in MAY_CHANGE]
        return [f"{n} was {other.get(n)!r}, is {mine[n]!r}" for n in names if other.get(n) != mine[n]]


def share_left(schedule: str, progress: float, until: float = 0.5) -> float:
    """λ: how much of the old norm is left when ``progress`` (0 to 1) of the training is done; 0 from ``until`` on."""
    t = min(1.0, max(0.0, progress / until))
    return {"linear": 1 - t, "cosine": 0.5 * (1 + math.cos(math.pi * t)), "none": 0.0}[schedule]
