"""scikit-learn's handwritten digits as tensors: what the demo models learnt from."""

from __future__ import annotations

from normconvert.tuning.data.digits import MEAN, STD, digits

__all__ = ["MEAN", "STD", "digits"]
