"""Reads the source's weight files beside the conversion: their sha256, and whether every parameter is finite."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normconvert.errors import InputError
from normconvert.sources import TensorInfo

CHUNK = 1 << 22


def check_finite(name: str, values: Tensor, file: Path | None = None) -> None:
    """Refuse NaN and infinities.

    Raises:
        InputError: names the tensor and the first such value.
    """
    if not values.is_floating_point():
        return
    if not is_finite(values):
        bad = values[~torch.isfinite(values)]
        where = f"{file}: " if file else ""
        raise InputError(f"{where}tensor {name} holds {bad.numel()} values that are NaN or infinite ({bad[0].item()})")


def is_finite(values: Tensor) -> bool:
    """Whether all values of a floating tensor are finite."""
    # A sum is much faster than isfinite, and is not finite if any term is not; it may overflow, so then look closely.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def _suspicious(chunk: memoryview, dtype: str) -> bool:
    """Whether a chunk may hold a value that is not finite. Never misses one; may be wrong the other way."""
    with np.errstate(all="ignore"):
        if dtype == "BF16" and len(chunk) % 4 == 0:
            pairs = np.frombuffer(chunk, np.uint32)  # bfloat16 is the upper half of float32, so two sums
            total = pairs.view(np.float32).sum() + (pairs << np.uint32(16)).view(np.float32).sum()
        elif dtype == "F16" and len(chunk) % 4 == 0:
            pairs = np.frombuffer(chunk, np.uint32) & np.uint32(0x7C007C00)  # an exponent of all ones carries over
            return bool(((pairs + np.uint32(0x04000400)) & np.uint32(0x80008000)).any())
        elif dtype in ("F32", "F64"):
            total = np.frombuffer(chunk, np.float32 if dtype == "F32" else np.float64).sum()
        else:
            return dtype in ("BF16", "F16")
    return not bool(np.isfinite(total))


class SourceReader(threading.Thread):
    """One pass over the weight files in the background.

    Attributes:
        hashes: file name -> sha256, filled when the thread is done.
    """

    def __init__(self, files: Sequence[Path], tensors: Sequence[TensorInfo], hashing: bool) -> None:
        """``tensors``: those that must be finite, with their places in ``files`` (none for pickles)."""
        super().__init__(name="normconvert-reader", daemon=True)
        self.hashes: dict[str, str] = {}
        self._files, self._hashing = files, hashing
        self._tensors = {file: sorted((t for t in tensors if t.file == file), key=_start) for file in files}
        self._error: BaseException | None = None
        self._halt = threading.Event()

    def __enter__(self) -> SourceReader:
        self.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._halt.set()
        self.join()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what the thread found so far."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """The thread's body."""
        try:
            for file in self._files:
                self._read(file)
        except BaseException as error:
            self._error = error

    def _read(self, file: Path) -> None:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK))
        queue = self._tensors[file]
        if not queue and not self._hashing:
            return
        at = 0
        with file.open("rb", buffering=0) as handle:
            while not self._halt.is_set():
                # Stop at tensor boundaries, so that a chunk has one dtype and its values are whole.
                while queue and at >= queue[0].end:
                    queue.pop(0)
                inside = bool(queue) and at >= queue[0].start
                limit = (queue[0].end if inside else queue[0].start) - at if queue else CHUNK
                chunk = buffer[: min(limit, CHUNK)]
                got = _fill(handle, chunk)
                if not got:
                    break
                chunk = chunk[:got]
                if self._hashing:
                    digest.update(chunk)
                if inside and _suspicious(chunk, queue[0].dtype):
                    from normconvert.sources.safetensors_file import map_tensor

                    check_finite(queue[0].name, map_tensor(queue[0]), file)
                at += got
        if self._hashing and not self._halt.is_set():
            self.hashes[file.name] = digest.hexdigest()


def _start(info: TensorInfo) -> int:
    return info.start


def _fill(handle: Any, chunk: memoryview) -> int:
    got = 0
    while got < len(chunk):
        n = handle.readinto(chunk[got:])
        if not n:
            break
        got += n
    return got
