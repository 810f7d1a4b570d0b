"""What is learnt from: ``KIND:WHERE``, made ready for the model and checked against it before anything is trained.

`opening` is the stage; `wanted` says what the model takes, `batches` in which order examples are seen, and each kind
has a file: `images`, `text`, `tables`, `arrays`, `digits`, `demo`. A new kind goes here. Nothing here knows a norm.
"""

from __future__ import annotations

from normconvert.tuning.data.batches import Data, all_batches, training_batch
from normconvert.tuning.data.opening import KINDS, open_data
from normconvert.tuning.data.wanted import Wanted, wanted_by

__all__ = ["KINDS", "Data", "Wanted", "all_batches", "open_data", "training_batch", "wanted_by"]
