"""What is learnt from: ``KIND:WHERE``, made ready for the model and checked against it before anything is trained."""

from __future__ import annotations

from .batches import Data, all_batches, training_batch
from .opening import KINDS, open_data
from .wanted import Wanted, wanted_by

__all__ = ["KINDS", "Data", "Wanted", "all_batches", "open_data", "training_batch", "wanted_by"]
