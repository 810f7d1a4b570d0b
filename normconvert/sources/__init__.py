"""A reference (folder, weight file, hub id, demo) in, a checked :class:`Source` out, and the models it can become.

`opening` is the stage; `hub` and `remote` speak to the hub, `libraries` says side by side what `transformers_models`
and `timm_models` do differently, `converted` loads what this package wrote. A new kind of source or library goes here.
Nothing heavy is imported until a source is opened, and nothing here knows what will be converted.
"""

from __future__ import annotations

from normconvert.files.tensor_info import TensorInfo
from normconvert.sources.opening import open_pair, open_source
from normconvert.sources.source import Source

__all__ = ["Source", "TensorInfo", "open_pair", "open_source"]
