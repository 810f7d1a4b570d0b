"""Plan x checkpoint files -> checkpoint files, streaming: memory for one tensor, not for the model (invariant I4).

Untouched tensors are copied as bytes inside the kernel. Edited ones are computed in float64, in blocks where the edits
permit, and stored in the source's dtype. Nothing here knows what a norm is.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normconvert.apply_layout import Layout, OutFile, OutTensor, can_stream, index_bytes, make_layout
from normconvert.apply_loaded import save_loaded
from normconvert.apply_output import copy_other_files, edit_config, set_dtype, staged_output, write_json
from normconvert.apply_scan import SourceReader, check_finite, is_finite
from normconvert.edits import Edit, apply_edits
from normconvert.errors import InputError
from normconvert.plan import Plan
from normconvert.sources import Source
from normconvert.sources.safetensors_file import read_tensor, torch_dtype

Progress = Callable[[str, int, int], None]
"""Called with the tensor being written, the bytes done and the bytes in all."""

BLOCK = 1 << 17  # elements edited at a time: 1 MiB in float64, which stays in the cache
COPY = 1 << 26  # bytes copied at a time, between two looks at progress and errors

# Which dimension of a tensor an edit needs whole; along the others it may be applied block by block.
# An edit that is not here needs the whole tensor.
NEEDS_WHOLE: dict[str, Callable[[Edit, int], set[int]]] = {
    "center": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "scale": lambda edit, ndim: {0, 1} if "groups" in edit else {int(edit["axis"]) % ndim},
    "shift": lambda edit, ndim: {int(edit["axis"]) % ndim},
    "fill": lambda edit, ndim: set(),
}


@dataclass(frozen=True)
class ApplyResult:
    """What was written.

    Attributes:
        files: names relative to the output folder, sorted.
        bytes_written: size of the weight files.
        edited: checkpoint names of the tensors that were edited or added.
        copied: how many tensors were copied unchanged.
        hashes: source file -> sha256, for the weight files and config.json (empty if not asked for).
        notes: sentences for the user.
    """

    files: tuple[str, ...]
    bytes_written: int
    edited: tuple[str, ...]
    copied: int
    hashes: dict[str, str]
    notes: tuple[str, ...] = ()


def apply_plan(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    hash_source: bool = True,
) -> ApplyResult:
    """Write the converted checkpoint to ``out``, complete or not at all.

    Args:
        source: the checkpoint, which is only read.
        plan: tensor edits in model names, and changes to config.json.
        out: the folder to make.
        dtype: store all floating tensors in this dtype; None: each in its own.
        max_shard_size: bytes a weight file; None: files as in the source.
        overwrite: replace an ``out`` that exists, once the new one is complete.
        progress: called as tensors are written.
        extra_files: further files, name -> content, written last.
        hash_source: compute sha256 of the source's files, beside the conversion.

    Raises:
        InputError: ``out`` cannot be written, the plan does not fit, or a weight is NaN or infinite.
    """
    with staged_output(out, source.folder or source.files[0], overwrite) as folder:
        return write_checkpoint(
            source, plan, folder, dtype=dtype, max_shard_size=max_shard_size, progress=progress,
            extra_files=extra_files, hash_source=hash_source,
        )  # fmt: skip


def write_checkpoint(
    source: Source,
    plan: Plan,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: Progress | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    hash_source: bool = True,
) -> ApplyResult:
    """:func:`apply_plan` into a folder that exists: for callers that check the result inside ``staged_output``."""
    notes: list[str] = []
    try:
        if source.folder is not None:
            _, refused = copy_other_files(source.folder, folder)
            notes += [f"{name} is a link that leads out of the source and was not copied" for name in refused]
        hashes, edited, copied = _write_weights(
            source, plan, folder, dtype, max_shard_size, progress, hash_source, notes
        )
        _write_config(source, plan, folder, dtype)
        for name, content in (extra_files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        raise InputError(f"cannot write the output: {error.strerror or error}{name}; nothing was kept") from error
    files = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return ApplyResult(files, size, edited, copied, hashes, tuple(notes))


def _write_weights(
    source: Source,
    plan: Plan,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | None,
    progress: Progress | None,
    hash_source: bool,
    notes: list[str],
) -> tuple[dict[str, str], tuple[str, ...], int]:
    files = list(source.files)
    if source.folder is not None and (source.folder / "config.json").is_file():
        files.append(source.folder / "config.json")
    # Pickles have no fixed places; their tensors are checked as they pass.
    parameters = [
        source.tensors[name] for name, target in source.name_map.items()
        if target not in source.buffers and not source.is_pickle
    ]  # fmt: skip
    with SourceReader(files, parameters, hash_source) as reader:
        if can_stream(source, plan):
            layout = make_layout(source, plan, dtype, max_shard_size)
            notes += layout.notes
            Writer(source, layout, reader, progress).write(folder)
            if layout.index is not None:
                (folder / layout.index[0]).write_bytes(index_bytes(source, layout.index))
            tensors = [t for file in layout.files for t in file.tensors]
            edited = tuple(t.name for t in tensors if t.edits)
            copied = len(tensors) - len(edited)
        else:
            edited, copied = save_loaded(source, plan, folder, dtype, max_shard_size)
            notes.append(
                f"{source.library} merges, splits or reshapes tensors of this checkpoint when it loads them: "
                "the plan was applied to the loaded model, which was saved again"
            )
    return reader.hashes, edited, copied


def _write_config(source: Source, plan: Plan, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json: the source's bytes unless something changes."""
    if not source.config or not (plan.config or dtype or source.described or not can_stream(source, plan)):
        return
    config: Mapping[str, Any] = source.config
    if dtype is not None:
        config = set_dtype(config, str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", edit_config(config, plan.config))


class Writer:
    """Writes the files of a layout, one tensor after the other."""

    def __init__(self, source: Source, layout: Layout, reader: SourceReader, progress: Progress | None) -> None:
        self._source, self._layout, self._reader, self._progress = source, layout, reader, progress
        self._done, self._total = 0, sum(file.nbytes for file in layout.files)
        self._small: dict[str, Tensor] = {}

    def write(self, folder: Path) -> None:
        """Write all files.

        Raises:
            InputError: a weight is NaN or infinite, or overflows the output's dtype.
            OSError: the disk is full, and the like.
        """
        with _one_thread():
            for file in self._layout.files:
                with (folder / file.name).open("wb", buffering=0) as handle:
                    self._write_file(handle.fileno(), file)

    def _write_file(self, fd: int, file: OutFile) -> None:
        _write_all(fd, memoryview(file.header), 0)
        self._advance("", len(file.header))
        at = len(file.header)
        for tensor in file.tensors:
            info = self._source.tensors[tensor.origin]
            if not tensor.edits and info.dtype == tensor.dtype and not self._source.is_pickle:
                self._copy(fd, tensor, at)
            else:
                self._compute(fd, tensor, at)
            at += tensor.nbytes
            self._reader.check()

    def _copy(self, fd: int, tensor: OutTensor, at: int) -> None:
        info = self._source.tensors[tensor.origin]
        with info.file.open("rb", buffering=0) as handle:
            done = 0
            while done < tensor.nbytes:
                n = _copy_range(handle.fileno(), fd, min(COPY, tensor.nbytes - done), info.start + done, at + done)
                if n == 0:
                    raise InputError(f"{info.file}: ended while tensor {info.name} was copied: is it being changed?")
                done += n
                self._advance(tensor.name, n)
                self._reader.check()

    def _compute(self, fd: int, tensor: OutTensor, at: int) -> None:
        """Edit, convert and write one tensor, by the largest blocks that the edits permit."""
        info, target = self._source.tensors[tensor.origin], torch_dtype(tensor.dtype)
        is_parameter = self._source.name_map.get(tensor.origin, "") not in {"", *self._source.buffers}
        dim = _block_dimension(tensor, info.shape)
        if dim == 0:
            self._compute_rows(fd, tensor, target, is_parameter, at)
            return
        # Blocks of columns are put together in memory first, in place where the dtype stays.
        in_place = dim is not None and not self._source.is_pickle and info.dtype == tensor.dtype
        value = read_tensor(info) if in_place else self._source.read(tensor.origin)
        if dim is None:
            self._write_tensor(fd, tensor, self._edited(tensor, value, target, is_parameter), at)
            return
        whole = value if in_place else torch.empty(tensor.shape, dtype=target)
        for start, stop in _blocks(info.shape, dim):
            block = value.narrow(dim, start, stop - start)
            whole.narrow(dim, start, stop - start).copy_(self._edited(tensor, block, target, is_parameter))
        self._write_tensor(fd, tensor, whole, at)

    def _compute_rows(self, fd: int, tensor: OutTensor, target: torch.dtype, is_parameter: bool, at: int) -> None:
        """Blocks of rows lie one behind the other in the file: read, edit and write one at a time."""
        info = self._source.tensors[tensor.origin]
        for start, stop in _blocks(info.shape, 0):
            if self._source.is_pickle:
                block = self._source.read(tensor.origin)[start:stop]
            else:
                block = read_tensor(info, (start, stop))
            at += self._write_tensor(fd, tensor, self._edited(tensor, block, target, is_parameter), at)

    def _edited(self, tensor: OutTensor, value: Tensor, target: torch.dtype, is_parameter: bool) -> Tensor:
        if is_parameter or tensor.edits:
            check_finite(tensor.origin, value)
        try:
            edited = (apply_edits(value, tensor.edits, self._lookup) if tensor.edits else value).to(target)
        except ValueError as error:
            raise InputError(f"tensor {tensor.name} cannot be computed: {error}") from error
        if is_parameter and edited.is_floating_point() and not is_finite(edited):
            largest = float(value.abs().max())
            raise InputError(f"tensor {tensor.name} (up to {largest:.3g}) overflows {target}: choose another --dtype")
        return edited

    def _lookup(self, name: str) -> Tensor:
        """A source tensor in float64 by its model name; small ones are kept, since many edits share them."""
        if name not in self._small:
            origin = self._layout.origins[name]
            value = self._source.read(origin)
            check_finite(origin, value)
            value = value.to(torch.float64)
            if value.numel() > BLOCK:
                return value
            self._small[name] = value
        return self._small[name]

    def _write_tensor(self, fd: int, tensor: OutTensor, value: Tensor, at: int) -> int:
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_all(fd, data, at)
        self._advance(tensor.name, len(data))
        return len(data)

    def _advance(self, name: str, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(name, self._done, self._total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are too small to share out: threads would only wait for each other (measured: 10 x slower when busy)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _block_dimension(tensor: OutTensor, shape: tuple[int, ...]) -> int | None:
    """The dimension along which the edits may be applied block by block; None: only to the whole."""
    if not shape or tensor.shape != shape or 0 in shape:
        return None
    whole: set[int] = set()
    for edit in tensor.edits:
        if edit["op"] not in NEEDS_WHOLE:
            return None
        whole |= NEEDS_WHOLE[edit["op"]](edit, len(shape))
    free = [dim for dim in range(len(shape)) if dim not in whole]
    if 0 in free:
        return 0
    return max(free, key=lambda dim: shape[dim], default=None)


def _blocks(shape: tuple[int, ...], dim: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``dim`` that hold about :data:`BLOCK` elements each."""
    step = max(1, BLOCK * shape[dim] // math.prod(shape))
    for start in range(0, shape[dim], step):
        yield start, min(start + step, shape[dim])


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(fd, data[:COPY], at)
        data, at = data[n:], at + n


def _copy_range(origin: int, target: int, count: int, from_offset: int, to_offset: int) -> int:
    """Copy bytes between files inside the kernel where it can (and share them where the file system can)."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(origin, target, count, from_offset, to_offset)
        except OSError as error:
            # Other file systems and old kernels: by hand. A full disk is a full disk.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    data = os.pread(origin, min(count, 1 << 22), from_offset)
    _write_all(target, memoryview(data), to_offset)
    return len(data)


__all__ = ["ApplyResult", "Progress", "apply_plan", "staged_output", "write_checkpoint"]
