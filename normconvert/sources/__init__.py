"""Sources: a model reference (folder, weight file, hub id, demo) becomes a :class:`Source`.

Nothing heavy is imported until a source is opened.
"""

from __future__ import annotations

from normconvert.sources.opening import open_pair, open_source
from normconvert.sources.source import Source, TensorInfo

__all__ = ["Source", "TensorInfo", "open_pair", "open_source"]
