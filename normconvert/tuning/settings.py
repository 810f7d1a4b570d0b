"""What a user chooses about a swap, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.option_fields import check_options, option
from normconvert.options import OUT, OVERWRITE, SRC, WRITTEN, Opening, Stage

SWAPS: Mapping[str, str] = {
    "un": "Unified Normalization",
    "repbn": "RepBN",
    "powernorm": "PowerNorm",
    "ln-free": "no norm: a frozen divisor",
    "sla": "simplified linear attention",
    "slab": "RepBN and simplified linear attention",
}
"""Method -> what it is, in words."""

NORMS = {"sla": "", "slab": "repbn"}
"""Method -> what takes the norms' place, where it is not the method itself; empty: they stay."""
PROGRESSIVE = ("repbn", "ln-free", "sla", "slab")
"""Methods whose old norms or attention fade or go by a schedule; the others' go at once."""
METHOD = (
    "What takes the norms' place: un (Unified Normalization), repbn, powernorm or ln-free; sla: a linear attention "
    "takes the attention's place; slab: repbn and sla."
)
DATA = (
    "imagefolder:DIR, text:FILE, parquet:FILE[:COLUMN], hf:NAME[:SPLIT][:COLUMN], npz:FILE, safetensors:FILE, or demo: "
    "for the embedded models' own."
)
MAY_CHANGE = frozenset({"max_minutes", "eval_data", "batches_between_checkpoints", "guard_tails"})
"""Settings that a resumed run may change: they do not touch what is learnt."""


@dataclass(frozen=True)
class Settings:
    """How norms are swapped.

    Attributes:
        feature_weight: of the match of features, block by block, beside the match of logits.
        matching: the share of the steps in which each layer's linear attention learns by itself to give what its
            softmax attention gives, before it takes its place (sla, slab).
        convolution: of the values, beside linear attention.
        spread_weight: of the loss that makes tokens equally long before the last norm goes (ln-free).
    """

    method: str = option(MISSING, METHOD, choices=tuple(SWAPS), metavar="METHOD")
    _: KW_ONLY
    data: str = option("demo:", DATA, metavar="KIND:WHERE", required=True)
    eval_data: str | None = option(None, "Measure on this; else on a part of --data held back.", metavar="KIND:WHERE")
    objective: str = option(
        "distill", "Learn from the original's outputs, or from the labels of the data.", choices=("distill", "task")
    )
    norms: Sequence[str] = option((), "Swap the norms at these paths only; may be repeated.", metavar="GLOB")
    attention: Sequence[str] = option(
        (),
        "sla, slab: swap the attention of the modules at these paths only, faster or not; may be repeated.",
        metavar="GLOB",
    )
    schedule: str = option(
        "linear",
        "repbn, ln-free, sla, slab: how the old norms and attention fade or go in the first half of the steps; "
        "none: at once.",
        choices=("linear", "cosine", "none"),
    )
    steps: int = option(1000, "Optimiser steps; 0 calibrates only.", metavar="N", at_least=0)
    batch_size: int = option(32, "Examples a step and process.", metavar="N", at_least=1)
    accumulate: int = option(1, "Batches a step.", metavar="N", at_least=1)
    lr: float = option(1e-3, "Peak learning rate of AdamW.", metavar="X")
    seed: int = option(0, "Of the order of the examples and their augmentation.", metavar="N")
    length: int | None = option(None, "Tokens an example of text; else what the model takes, at most 256.", metavar="N")
    calibration: int = option(256, "Examples for the first statistics.", metavar="N", at_least=1)
    feature_weight: float = 1.0
    spread_weight: float = 0.1
    matching: float = 0.25
    convolution: bool = True
    window: int = option(4, "un: batches whose statistics are smoothed; 1: no smoothing.", metavar="M", at_least=1)
    filtration: bool = option(True, "un: leave outlier batches out.", spelling="--filtration/--no-filtration")
    # There is no fp16: its changing loss scale would get into the gradient statistics of un and powernorm.
    mixed_precision: str = option(
        "no", "Train in bfloat16 where that is safe.", choices=("no", "bf16"), aliases={"bfloat16": "bf16"}
    )
    max_minutes: float | None = option(
        None, "End earlier, the schedule fitted to the time; such a run cannot be repeated exactly.", metavar="X"
    )
    guard_tails: float | None = option(
        None, "Fail where the worst losses, of held-out or odd data, are more than X times the original's.", metavar="X"
    )
    batches_between_checkpoints: int = option(
        500, "Steps between two saved states in OUT.training; 0: none.", metavar="N", spelling="--checkpoint-every"
    )

    def check(self) -> None:
        """Raise InputError if one of them has a value that it cannot have."""
        check_options(self)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr is {self.lr}; expected a positive number")
        if self.length is not None and self.length < 2:
            raise InputError(f"length is {self.length}; expected 2 or more tokens")
        if self.norms and not self.norm_method:
            raise InputError("--norms is for methods that swap norms, and sla leaves them as they are")
        if self.attention and not self.linear:
            raise InputError(f"--attention is for sla and slab, and {self.method} leaves attention as it is")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(f"max_minutes is {self.max_minutes}; expected a positive number")
        if self.guard_tails is not None and not 1 <= self.guard_tails < math.inf:
            raise InputError(f"guard_tails is {self.guard_tails}; expected a number of 1 or more")

    @property
    def norm_method(self) -> str:
        """What takes the norms' place; empty: they stay."""
        return NORMS.get(self.method, self.method)

    @property
    def linear(self) -> bool:
        """Whether attention becomes linear."""
        return self.method in NORMS

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
        return asdict(self) | {"norms": list(self.norms), "attention": list(self.attention)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What keeps a run with ``other`` settings from being resumed with these, one clause each."""
        mine = self.to_json()
        names = [f.name for f in fields(self) if f.name not in MAY_CHANGE]
        return [f"{n} was {other.get(n)!r}, is {mine[n]!r}" for n in names if other.get(n) != mine[n]]


@dataclass(frozen=True)
class _Place:
    """From where to where; before the settings, as the arguments of a swap stand."""

    src: str | Path = option(MISSING, SRC, metavar="SRC")
    out: Path | str = option(MISSING, OUT, metavar="OUT")


@dataclass(frozen=True)
class Swapping(Settings, Opening, _Place):
    """What :func:`normconvert.swap` is asked. The state of an unfinished run lies in ``OUT.training`` beside OUT.

    Attributes:
        watch: sees each step's figures.
        stage: called with each stage's name as it begins.
        warn: called, before anything is trained, with each sentence that the user may want to stop for.
    """

    method: str = option("un", METHOD, choices=tuple(SWAPS), metavar="METHOD")
    _: KW_ONLY
    calibrate_only: bool = option(False, "Set the statistics from one pass; train nothing.")
    fuse: bool = option(True, "Move the swapped norms into what reads them.", spelling="--fuse/--no-fuse")
    resume: bool = option(False, "Go on with an interrupted training.")
    tensorboard: str | Path | None = option(None, "Write a TensorBoard log.", metavar="DIR")
    overwrite: bool = option(False, OVERWRITE, panel=WRITTEN)
    device: str = option("cpu", "Where the networks run; several processes take a GPU each.", metavar="DEVICE")
    watch: Callable[[int, int, Any], None] | None = None
    stage: Stage | None = None
    warn: Stage | None = None

    @property
    def settings(self) -> Settings:
        """How norms are swapped, without from where to where."""
        chosen = {one.name: getattr(self, one.name) for one in fields(Settings)}
        return Settings(**(chosen | {"steps": 0} if self.calibrate_only else chosen))


def share_left(schedule: str, progress: float, until: float = 0.5) -> float:
    """λ: how much of the old norm is left when ``progress`` (0 to 1) of the training is done; 0 from ``until`` on."""
    t = min(1.0, max(0.0, progress / until))
    return {"linear": 1 - t, "cosine": 0.5 * (1 + math.cos(math.pi * t)), "none": 0.0}[schedule]
