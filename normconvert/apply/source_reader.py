"""Reads the source's weight files beside the conversion: their sha256, and whether every parameter is finite.

While the model is traced the machine has nothing else to do, so the files may be copied as well. What turns out to be
edited is written over; what is not is there already.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.apply.scan import Scan, Span
from normconvert.apply.scan_process import ProcessGone, ScanProcess
from normconvert.errors import InputError
from normconvert.files.digest import mark
from normconvert.files.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

APART = 1 << 28
"""Bytes from which a process of its own reads: fewer are read by a thread before such a process has started."""


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


def overflows(name: str, original: Tensor | None, dtype: torch.dtype) -> InputError:
    """The refusal of a tensor that is finite in its own dtype and infinite in ``dtype``."""
    size = f" (up to {float(original.abs().max()):.3g})" if original is not None else ""
    return InputError(f"tensor {name}{size} overflows {dtype}: choose another --dtype")


def is_finite(values: Tensor) -> bool:
    """Whether all values of a floating tensor are finite."""
    if values.numel() == 0:
        return True
    # Much faster than isfinite on all of them; both ends are NaN if any value is.
    low, high = values.aminmax()
    return bool(low.isfinite()) and bool(high.isfinite())


class SourceReader:
    """One pass over the weight files in the background, begun as soon as the files are known.

    Use it as a context: leaving it waits for the end of the pass, or stops it if an exception is on its way.

    Attributes:
        hashes: file name -> sha256, filled as files are done.
    """

    def __init__(self, hashing: bool = True) -> None:
        self.hashes: dict[str, str] = {}
        self._hashing = hashing
        self._tensors: dict[str, TensorInfo] = {}
        self._bad: list[TensorInfo] = []
        self._required: frozenset[tuple[Path, int]] = frozenset()
        self._error: BaseException | None = None
        self._copies: Path | None = None
        self._files: dict[str, list[Span]] = {}
        self._scan: Scan | ScanProcess | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._marks: dict[str, tuple[int, int, int, int]] = {}

    def begin(self, tensors: Iterable[TensorInfo], folder: Path | None = None, copies: Path | None = None) -> None:
        """Start to read the files that hold ``tensors``, and the config.json of ``folder``.

        Args:
            tensors: of the checkpoint.
            folder: the checkpoint's.
            copies: a folder to copy the files to, as far as it goes until :meth:`keep_copies`.
        """
        files = self._files
        for info in tensors:
            spans = files.setdefault(str(info.file), [])
            if info.start >= 0:  # pickles have no fixed places: their tensors are checked as they pass
                self._tensors[info.name] = info
                spans.append(Span(info.start, info.end, info.dtype, info.name))
        # Copies go by the files' names alone: two of one name would be written over each other.
        if hasattr(os, "copy_file_range") and len({Path(file).name for file in files}) == len(files):
            self._copies = copies
        if folder is not None and (folder / "config.json").is_file():
            # After the copies were settled: it is hashed for the record, and copied with the other small files.
            files[str(folder / "config.json")] = []
        self._marks = {file: mark(file) for file in files}
        where = None if self._copies is None else str(self._copies)
        if sum(span.end - span.start for spans in files.values() for span in spans) >= APART:
            with suppress(OSError):  # none may be started here
                self._scan = ScanProcess(files, self._found, self._hashing, where)
        self._scan = self._scan or Scan(files, self._found, self._hashing, where)
        self._thread = threading.Thread(target=self._run, name="normconvert-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._scan is not None
        try:
            try:
                self._scan.run()
            except ProcessGone:  # somebody killed it, or it cannot run here
                # From the beginning, but without copies: what was told before is told again, which changes nothing.
                self._scan = Scan(self._files, self._found, self._hashing)
                # A pass that is to end may have lost its process by that.
                if not self._stopped:
                    self._scan.run()
        # Kept for check(): an exception in this thread would be printed and lost.
        except BaseException as error:
            self._error = error

    def _found(self, kind: str, file: str, what: str) -> None:
        if kind == "hash":
            self.hashes[Path(file).name] = what
        else:
            self._bad.append(self._tensors[what])

    def require(self, tensors: Iterable[TensorInfo]) -> None:
        """Say which tensors must be finite; until then :meth:`check` lets all pass."""
        # By their places: names may have lost a prefix since the pass began.
        self._required = frozenset((info.file, info.start) for info in tensors)

    def keep_copies(self, names: Set[str]) -> dict[str, int]:
        """Stop copying; copies of other names than these are removed. Returns how many bytes of each are there."""
        folder, self._copies = self._copies, None
        if self._scan is None or folder is None:
            return {}
        # Before anything is removed: from here on nobody writes to them.
        copied = self._scan.keep()
        for file, spans in self._files.items():
            name = Path(file).name
            # A file of the source that the output does not have in this form must not stay beside it.
            if spans and name not in names:
                (folder / name).unlink(missing_ok=True)
        return {name: size for name, size in copied.items() if name in names}

    def check(self) -> None:
        """Raise what the pass found so far.

        Raises:
            InputError: a tensor that is required to be finite is not.
        """
        if self._error is not None:
            raise self._error
        # A copy: the other thread goes on adding.
        for info in list(self._bad):
            if (info.file, info.start) in self._required:
                from normconvert.files.safetensors_file import map_tensor

                # The pass saw bits; what the values are and how many is told from the tensor itself.
                check_finite(info.name, map_tensor(info), info.file)

    def finish(self) -> None:
        """Wait for the end of the pass; raises as :meth:`check` does."""
        if self._thread is not None:
            self._thread.join()
        self.check()
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Refuse a source that was written to since :meth:`begin`: what was made of it is of two states.

        Raises:
            InputError: names the file.
        """
        for file, before in self._marks.items():
            if mark(file) != before:
                raise InputError(f"{file}: changed while it was converted: run again when it is complete")

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # After an error nobody wants the hashes, and reading on would take as long as the conversion.
        if kind is not None and self._scan is not None:
            self._stopped = True
            self._scan.stop()
        if self._thread is not None:
            self._thread.join()
