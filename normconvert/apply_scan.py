"""Reads the source's weight files beside the conversion: their sha256, and whether every parameter is finite.

While the model is traced the machine has nothing else to do, so the files may be copied as well. What turns out to be
edited is written over; what is not is there already.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normconvert.errors import InputError
from normconvert.sources import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 26
"""Bytes read at a time. Large: between two chunks the thread waits for whatever Python the main thread runs."""

# dtype -> integers of its size, and the smallest bit patterns, positive and negative, of what is not finite
# (infinity, then the NaNs): the largest integer of a chunk tells, and takes one quick pass to find.
_LIMITS: Mapping[str, tuple[str, int, int]] = {
    "F16": ("2", 0x7C00, 0xFC00),
    "BF16": ("2", 0x7F80, 0xFF80),
    "F32": ("4", 0x7F800000, 0xFF800000),
    "F64": ("8", 0x7FF0000000000000, 0xFFF0000000000000),
}


def check_finite(name: str, values: Tensor, file: Path | None = None) -> None:
    """Refuse NaN and infinities.

    Raises:
        InputError: names the tensor and the first such value.
    """
    if not values.is_floating_point():
        return
    if not is_finite(values):
        bad = values[~values.isfinite()]
        where = f"{file}: " if file else ""
        found = "a value that is" if bad.numel() == 1 else f"{bad.numel()} values that are"
        raise InputError(f"{where}tensor {name} holds {found} NaN or infinite ({bad[0].item()})")


def is_finite(values: Tensor) -> bool:
    """Whether all values of a floating tensor are finite."""
    if values.numel() == 0:
        return True
    # Much faster than isfinite on all of them; both ends are NaN if any value is.
    low, high = values.aminmax()
    return bool(low.isfinite()) and bool(high.isfinite())


def _all_finite(chunk: memoryview, dtype: str) -> bool:
    """Whether a chunk of whole values of one dtype holds only finite ones."""
    if dtype not in _LIMITS or not chunk:
        return True
    size, positive, negative = _LIMITS[dtype]
    largest = int(np.frombuffer(chunk, f"<i{size}").max())  # of the values without a sign
    smallest = int(np.frombuffer(chunk, f"<u{size}").max())  # of those with one, where there are any
    return largest < positive and smallest < negative


class SourceReader(threading.Thread):
    """One pass over the weight files in the background, begun as soon as the files are known.

    Use it as a context: leaving it waits for the end of the pass, or stops it if an exception is on its way.

    Attributes:
        hashes: file name -> sha256, filled as files are done.
    """

    def __init__(self, hashing: bool = True) -> None:
        super().__init__(name="normconvert-reader", daemon=True)
        self.hashes: dict[str, str] = {}
        self._hashing = hashing
        self._tensors: dict[Path, list[TensorInfo]] = {}
        self._bad: list[TensorInfo] = []
        self._required: frozenset[str] = frozenset()
        self._error: BaseException | None = None
        self._halt = threading.Event()
        self._copies: Path | None = None
        self._copied: dict[str, int] = {}
        self._copying = threading.Lock()

    def begin(self, tensors: Iterable[TensorInfo], folder: Path | None = None, copies: Path | None = None) -> None:
        """Start to read the files that hold ``tensors``, and the config.json of ``folder``.

        Args:
            tensors: of the checkpoint.
            folder: the checkpoint's.
            copies: a folder to copy the files to, as far as it goes until :meth:`keep_copies`.
        """
        for info in tensors:
            queue = self._tensors.setdefault(info.file, [])
            if info.start >= 0:  # pickles have no fixed places: their tensors are checked as they pass
                queue.append(info)
        for queue in self._tensors.values():
            queue.sort(key=lambda info: info.start)
        if hasattr(os, "copy_file_range") and len({file.name for file in self._tensors}) == len(self._tensors):
            self._copies = copies
        if folder is not None and (folder / "config.json").is_file():
            self._tensors[folder / "config.json"] = []
        self.start()

    def require(self, names: Iterable[str]) -> None:
        """Say which tensors must be finite (checkpoint names); until then :meth:`check` lets all pass."""
        self._required = frozenset(names)

    def keep_copies(self, names: Set[str]) -> dict[str, int]:
        """Stop copying; copies of other names than these are removed. Returns how many bytes of each are there."""
        with self._copying:
            folder, self._copies = self._copies, None
        if folder is not None:
            for name in set(self._copied) - set(names):
                (folder / name).unlink()
        return {name: size for name, size in self._copied.items() if folder is not None and name in names}

    def check(self) -> None:
        """Raise what the thread found so far.

        Raises:
            InputError: a tensor that is required to be finite is not.
        """
        if self._error is not None:
            raise self._error
        for info in list(self._bad):
            if info.name in self._required:
                from normconvert.sources.safetensors_file import map_tensor

                check_finite(info.name, map_tensor(info), info.file)

    def finish(self) -> None:
        """Wait for the end of the pass; raises as :meth:`check` does."""
        if self.ident is not None:
            self.join()
        self.check()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._halt.set()
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        """The thread's body."""
        try:
            largest = max((file.stat().st_size for file in self._tensors), default=0)
            buffer = memoryview(bytearray(min(CHUNK, max(largest, 1))))
            for file, queue in self._tensors.items():
                self._read(file, queue, buffer)
        except BaseException as error:
            self._error = error

    def _read(self, file: Path, queue: list[TensorInfo], buffer: memoryview) -> None:
        if not queue and not self._hashing:
            return
        digest = hashlib.sha256()
        at = 0
        with file.open("rb", buffering=0) as handle:
            while not self._halt.is_set():
                # Stop at tensor boundaries, so that a chunk has one dtype and its values are whole.
                while queue and at >= queue[0].end:
                    queue.pop(0)
                inside = bool(queue) and at >= queue[0].start
                limit = (queue[0].end if inside else queue[0].start) - at if queue else len(buffer)
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
                if inside and got == size and not _all_finite(chunk, queue[0].dtype):
                    self._bad.append(queue[0])
                if queue:
                    self._copy(handle.fileno(), file.name, at, got)
                at += got
        if self._hashing and not self._halt.is_set():
            self.hashes[file.name] = digest.hexdigest()

    def _copy(self, origin: int, name: str, at: int, count: int) -> None:
        """Copy what was just read, if all before it is there as well."""
        with self._copying:
            if self._copies is None or self._copied.get(name, 0) != at:
                return
            try:
                with (self._copies / name).open("r+b" if at else "wb", buffering=0) as copy:
                    self._copied.setdefault(name, 0)
                    while count and (n := os.copy_file_range(origin, copy.fileno(), count, at, at)):
                        at, count = at + n, count - n
                        self._copied[name] = at
            except OSError:  # a full disk, or a file system that cannot: the writer will see for itself
                return


def _fill(handle: Any, chunk: memoryview) -> int:
    got = 0
    while got < len(chunk):
        n = handle.readinto(chunk[got:])
        if not n:
            break
        got += n
    return got
