"""The sha256 of a file, and whether it is still the file that it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def mark(file: str | Path) -> tuple[int, int, int, int]:
    """What is another number once a file was written to or replaced; zeros if it is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
