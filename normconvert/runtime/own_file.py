"""What ``shipping`` is in an output, where there is one file and no package."""

from __future__ import annotations

from pathlib import Path


def own_source() -> str:
    """What ``save_pretrained`` writes beside the weights: this file."""
    return Path(__file__).read_text(encoding="utf-8")
