"""What an export is asked: its options, each defined once. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path

from normconvert.options import SRC, TRUST, option


@dataclass(frozen=True)
class Export:
    """What :func:`normconvert.export` is asked."""

    src: str | Path = option(MISSING, SRC, metavar="SRC")
    file: Path | str = option(MISSING, "model.onnx, or model.pt2 for torch.export.", metavar="FILE")
    _: KW_ONLY
    against: str | Path | None = option(None, "Compare with the original checkpoint as well.", metavar="SRC")
    overwrite: bool = option(False, "Replace a FILE that exists, once the new one is whole.")
    trust_remote_code: bool = option(False, TRUST)
