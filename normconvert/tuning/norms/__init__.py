"""The norms to train with: each is LayerNorm's stand-in while statistics are learnt, and a∘x + b in the end.

All of them read one axis of their input, take ``valid`` (a mask of the tokens that count) and give, by ``affine()``,
the channel-wise map that they are in eval mode once their training is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normconvert.tuning.norms.frozen import FrozenNorm
from normconvert.tuning.norms.power import PowerNorm
from normconvert.tuning.norms.repbn import RepBatchNorm
from normconvert.tuning.norms.unified import UnifiedNorm

TRAINING_NORMS: dict[str, Callable[..., Any]] = {
    "un": UnifiedNorm,
    "repbn": RepBatchNorm,
    "powernorm": PowerNorm,
    "ln-free": FrozenNorm,
}
"""Method of ``normconvert swap`` -> the norm it trains with: ``(size, eps, axis=...)``."""

SwapNorm = UnifiedNorm | RepBatchNorm | PowerNorm | FrozenNorm

__all__ = ["TRAINING_NORMS", "FrozenNorm", "PowerNorm", "RepBatchNorm", "SwapNorm", "UnifiedNorm"]
