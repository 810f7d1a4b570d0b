"""One pass over weight files: their sha256, whether every value is finite, and a copy.

It needs no torch, so that a process of its own can do it from the first moment (:mod:`normconvert.apply.scan_process`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHUNK = 1 << 18
"""Bytes read at a time: they are hashed, looked at and copied while they are in a core's own cache."""

# dtype -> integers of its size, and the smallest bit patterns, positive and negative, of what is not finite
# (infinity, then the NaNs): the largest integer of a chunk tells, and takes one quick pass to find.
_LIMITS: Mapping[str, tuple[str, int, int]] = {
    "F16": ("2", 0x7C00, 0xFC00),
    "BF16": ("2", 0x7F80, 0xFF80),
    "F32": ("4", 0x7F800000, 0xFF800000),
    "F64": ("8", 0x7FF0000000000000, 0xFFF0000000000000),
}

Tell = Callable[[str, str, Any], None]
"""Called with what was found: ``("hash", path, hex digits)`` and ``("bad", path, name of a tensor)``."""


class Span(NamedTuple):
    """The place of a tensor in its file, in bytes."""

    start: int
    end: int
    dtype: str
    name: str


class Scan:
    """The pass, in the thread that calls :meth:`run`; :meth:`keep` and :meth:`stop` are for others.

    Args:
        files: path -> the tensors in it whose values are looked at.
        tell: called with what is found.
        hashing: whether to compute sha256.
        copies: a folder to copy the files to, as far as it goes until :meth:`keep`.
    """

    def __init__(
        self, files: Mapping[str, Iterable[Span]], tell: Tell, hashing: bool = True, copies: str | None = None
    ) -> None:
        self._files = {path: sorted(spans) for path, spans in files.items()}
        self._tell, self._hashing, self._copies = tell, hashing, copies
        self._copied: dict[str, int] = {}
        # The lock is what makes keep() final: when it has returned, nothing more is written to the copies.
        self._copying, self._halt = threading.Lock(), threading.Event()

    def run(self) -> None:
        """Read all files.

        Raises:
            OSError: one cannot be read.
        """
        largest = max((os.stat(path).st_size for path in self._files), default=0)
        buffer = memoryview(bytearray(min(CHUNK, max(largest, 1))))
        for path, spans in self._files.items():
            # Nothing is asked of a file whose values nobody looks at, such as config.json or a pickle, but its hash.
            if spans or self._hashing:
                self._read(path, list(spans), buffer)

    def stop(self) -> None:
        """End the pass after the chunk at hand."""
        self._halt.set()

    def keep(self) -> dict[str, int]:
        """Stop copying. Returns how many bytes of each file, by its name, are there."""
        with self._copying:
            self._copies = None
        return self._copied

    def _read(self, path: str, spans: list[Span], buffer: memoryview) -> None:
        digest = hashlib.sha256()
        at, name, copied, bad = 0, os.path.basename(path), bool(spans), set[str]()
        # Unbuffered: chunks go straight into the one buffer, which stays in the cache.
        with open(path, "rb", buffering=0) as handle:
            while not self._halt.is_set():
                # Stop at tensor boundaries, so that a chunk has one dtype and its values are whole.
                while spans and at >= spans[0].end:
                    spans.pop(0)
                inside = bool(spans) and at >= spans[0].start
                limit = (spans[0].end if inside else spans[0].start) - at if spans else len(buffer)
                # A buffer that holds the largest file may be no multiple of a value's size.
                size = min(limit, len(buffer) if limit <= len(buffer) else len(buffer) // 8 * 8)
                chunk = buffer[:size]
                got = _fill(handle, chunk)
                if not got:
                    break
                chunk = chunk[:got]
                if self._hashing:
                    digest.update(chunk)
                # A file that ends early is somebody else's to report.
                if inside and got == size and spans[0].name not in bad and not all_finite(chunk, spans[0].dtype):
                    bad.add(spans[0].name)
                    self._tell("bad", path, spans[0].name)
                if copied:
                    self._copy(handle.fileno(), name, at, got)
                at += got
        # The hash of a pass that was stopped is of a part of the file only.
        if self._hashing and not self._halt.is_set():
            self._tell("hash", path, digest.hexdigest())

    def _copy(self, origin: int, name: str, at: int, count: int) -> None:
        """Copy what was just read, if all before it is there as well."""
        with self._copying:
            # What is counted is the length from the beginning: a chunk behind a gap would make the count a lie.
            if self._copies is None or self._copied.get(name, 0) != at:
                return
            try:
                with (Path(self._copies) / name).open("r+b" if at else "wb", buffering=0) as copy:
                    self._copied.setdefault(name, 0)
                    while count and (n := os.copy_file_range(origin, copy.fileno(), count, at, at)):
                        at, count = at + n, count - n
                        self._copied[name] = at
            except OSError:  # a full disk, or a file system that cannot: the writer will see for itself
                return


def all_finite(chunk: memoryview, dtype: str) -> bool:
    """Whether a chunk of whole values of one dtype, named as in safetensors, holds only finite ones."""
    if dtype not in _LIMITS or not chunk:
        return True
    size, positive, negative = _LIMITS[dtype]
    # Bits of floats are ordered as integers are, those with a sign by size behind all others; one maximum is one pass.
    largest = int(np.frombuffer(chunk, f"<i{size}").max())  # of the values without a sign
    smallest = int(np.frombuffer(chunk, f"<u{size}").max())  # of those with one, where there are any
    return largest < positive and smallest < negative


def _fill(handle: Any, chunk: memoryview) -> int:
    got = 0
    while got < len(chunk):
        # An unbuffered read may give less than was asked for, and a chunk of half a value cannot be looked at.
        n = handle.readinto(chunk[got:])
        if not n:
            break
        got += n
    return got
