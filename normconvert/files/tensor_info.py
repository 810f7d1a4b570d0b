"""Where one tensor of a checkpoint lies, before a byte of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """Where one checkpoint tensor lies.

    Attributes:
        name: name in the checkpoint.
        file: the file that holds it.
        dtype: safetensors dtype name, e.g. ``F32``.
        shape: its shape.
        start: first byte in ``file``; -1 for pickles, which have no fixed place.
        end: one past the last byte in ``file``; -1 for pickles.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = -1
    end: int = -1
