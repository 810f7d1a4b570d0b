"""Where one tensor of a checkpoint lies, before a byte of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from normconvert.errors import InputError

LONGEST = 1000
"""Characters of a tensor's name."""
COUNTER = "num_batches_tracked"
"""How the name of a batch norm's counter ends: an integer, but tools that store all tensors in one dtype make it a
floating number."""


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


def check_name(path: Path, name: str) -> None:
    """Refuse a tensor's name that would spoil a message: with line breaks and the like it could forge one.

    Raises:
        InputError: it is not printable, or longer than any module path.
    """
    if not name.isprintable() or len(name) > LONGEST:
        raise InputError(f"{path}: a tensor's name is no name: {name[:LONGEST]!r}; refused")
