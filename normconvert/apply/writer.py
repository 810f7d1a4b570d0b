"""Writes the files of a layout: two tensors at a time, each by a thread of its own.

Untouched tensors are copied as bytes inside the kernel; edited ones are computed by :mod:`normconvert.apply.blocks`.
Every tensor has its place in its file before anything is written, so the order in which they are done does not show.
"""

from __future__ import annotations

import errno
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from normconvert.apply.blocks import Workspace, block_dimension, centres_rows, edit_rows, edit_whole, mean_of_rows
from normconvert.apply.layout import Layout, OutFile, OutTensor
from normconvert.apply.scan import all_finite
from normconvert.apply.source_reader import SourceReader, check_finite, overflows
from normconvert.apply.underflow import Underflow
from normconvert.apply.workers import WORKERS, one_thread
from normconvert.errors import InputError
from normconvert.files.safetensors_file import read_tensor, torch_dtype
from normconvert.files.tensor_info import TensorInfo
from normconvert.plan.edits import SMALL
from normconvert.sources import Source

Progress = Callable[[str, int, int], None]
"""Called with the tensor being written, the bytes done and the bytes in all."""

COPY = 1 << 26  # bytes copied at a time, between two looks at progress and errors
PIECE = 1 << 19  # elements of rows that are read, edited and written at once: they stay in the cache


@dataclass(frozen=True)
class Task:
    """One tensor to be written at ``at`` of a file."""

    file: Path
    tensor: OutTensor
    at: int


class _Stopped(Exception):
    """Another thread has failed."""


class Writer:
    """Writes the files of a layout.

    Attributes:
        total: bytes of all files.
    """

    def __init__(self, source: Source, layout: Layout, folder: Path, progress: Progress | None) -> None:
        self._source, self._layout, self._folder, self._progress = source, layout, folder, progress
        self._done, self.total = 0, sum(file.nbytes for file in layout.files)
        self._small: dict[str, Tensor] = {}
        self._no_parameters = frozenset({"", *source.buffers})

    def start(self, reader: SourceReader | None = None) -> list[Task]:
        """Make the files, with their headers; those that are there keep their data. Returns what is to be written.

        What ``reader`` has copied already is not.
        """
        tasks: list[Task] = []
        # The reader lets go of the copies before their files are opened here.
        copied = {} if reader is None else reader.keep_copies({f.name for f in self._layout.files if self._as_is(f)})
        for file in self._layout.files:
            path, at = self._folder / file.name, len(file.header)
            # Not "w": what the reader or an earlier run has put there is kept.
            path.touch()
            with path.open("r+b", buffering=0) as handle:
                _write_all(handle.fileno(), memoryview(file.header), 0)
                # At once: tensors are put at their places in any order, and a copy of a longer file loses its end.
                handle.truncate(file.nbytes)
            self._advance("", len(file.header))
            for tensor in file.tensors:
                task = Task(path, tensor, at)
                at += tensor.nbytes
                # `at` is the tensor's end by now: it has been copied whole.
                if not tensor.edits and at <= copied.get(file.name, 0):
                    self.skip([task])
                else:
                    tasks.append(task)
        return tasks

    def _as_is(self, file: OutFile) -> bool:
        """Whether a file of the source has the same name and holds the same tensors at the same places."""
        infos = [self._source.tensors[tensor.origin] for tensor in file.tensors]
        if self._source.is_pickle or not infos or any(info.file.name != file.name for info in infos):
            return False
        at, places = len(file.header), []
        for tensor in file.tensors:
            places.append((tensor.name, tensor.dtype, at, at + tensor.nbytes))
            at += tensor.nbytes
        return places == [(info.name, info.dtype, info.start, info.end) for info in infos]

    def skip(self, tasks: Iterable[Task]) -> None:
        """Count tasks as done that were done before."""
        for task in tasks:
            self._advance(task.tensor.name, task.tensor.nbytes)

    def run(self, tasks: Iterable[Task], reader: SourceReader) -> None:
        """Do the tasks, looking at what the reader finds; progress and errors come to this thread, as Ctrl-C does.

        Raises:
            InputError: a weight is NaN or infinite, or overflows the output's dtype.
            OSError: the disk is full, and the like.
        """
        tasks = list(tasks)
        supply, before = _Supply(tasks), self._done
        self._events: queue.SimpleQueue[tuple[str, int] | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        count = min(WORKERS, os.cpu_count() or 1)
        with one_thread():
            workers = [threading.Thread(target=self._work, args=(supply,), daemon=True) for _ in range(count)]
            for worker in workers:
                worker.start()
            error: BaseException | None = None
            try:
                while count:
                    event = self._events.get()
                    if event is None:
                        count -= 1
                    elif isinstance(event, BaseException):
                        # The first is the cause. It is raised when every worker is out of the files.
                        error = error or event
                    else:
                        self._advance(*event)
                        reader.check()
            finally:
                self._stop.set()
                for worker in workers:
                    worker.join()
        if error is not None:
            raise error
        expected = sum(task.tensor.nbytes for task in tasks)
        if self._done - before != expected:  # a file has its full length from the start: nobody else would notice
            raise RuntimeError(f"{self._done - before} bytes written, expected {expected}")

    def _work(self, supply: Iterable[Task]) -> None:
        torch.set_num_threads(1)  # torch keeps it by thread
        workspace = Workspace()
        try:
            for task in supply:
                self._write_task(task, workspace)
        except _Stopped:
            pass
        # Whatever it is: a thread that ends in silence would leave its tensor full of zeros.
        except BaseException as error:
            self._stop.set()
            self._events.put(error)
        finally:
            # In any case: run() counts these to know when to stop waiting.
            self._events.put(None)

    def _write_task(self, task: Task, workspace: Workspace) -> None:
        tensor = task.tensor
        with task.file.open("r+b", buffering=0) as handle:
            fd = handle.fileno()
            if not (tensor.edits or self._source.is_pickle) and self._info(tensor).dtype == tensor.dtype:
                self._copy(fd, task)
                return
            try:
                self._compute(fd, task, workspace)
            # Such as a scale that is not finite, found when the stored vectors are there.
            except ValueError as error:
                raise InputError(f"tensor {tensor.name} cannot be computed: {error}") from error

    def _info(self, tensor: OutTensor) -> TensorInfo:
        if self._source.fetch is not None:
            # Before the place is used: of a file on the hub there is only a hole until then.
            self._source.fetch(tensor.origin)
        return self._source.tensors[tensor.origin]

    def _copy(self, fd: int, task: Task) -> None:
        info, tensor = self._info(task.tensor), task.tensor
        with info.file.open("rb", buffering=0) as handle:
            done = 0
            while done < tensor.nbytes:
                count = min(COPY, tensor.nbytes - done)
                n = _copy_range(handle.fileno(), fd, count, info.start + done, task.at + done)
                # The files were measured when they were opened: an end that comes earlier would leave zeros.
                if n == 0:
                    raise InputError(f"{info.file}: ended while tensor {info.name} was copied: is it being changed?")
                done += n
                self._wrote(tensor.name, n)

    def _compute(self, fd: int, task: Task, workspace: Workspace) -> None:
        """Edit, convert and write one tensor: the whole of it, or some rows at a time where the edits permit."""
        tensor, info = task.tensor, self._info(task.tensor)
        target, lost = torch_dtype(tensor.dtype), Underflow(tensor.name, tensor.edits)
        by_rows = block_dimension(tensor.edits, info.shape, tensor.shape) == 0
        if self._source.is_pickle:
            value = self._source.read(tensor.origin)
            self._check(tensor, value)
            edited = value.to(target)
            if tensor.edits:
                edited = edit_whole(value, tensor.edits, self._lookup, target, see=lost.see)
            self._write_tensor(fd, tensor, edited, task.at)
        elif by_rows or centres_rows(tensor.edits, info.shape, tensor.shape):
            with info.file.open("rb", buffering=0) as handle:
                self._compute_rows(fd, task, info, handle, target, workspace, lost, centred=not by_rows)
        else:  # blocks of columns are put together in memory first
            value = read_tensor(info, memory=workspace.raw)
            self._check(tensor, value)
            edited = edit_whole(
                value, tensor.edits, self._lookup, target, in_place=True, workspace=workspace, see=lost.see
            )
            self._write_tensor(fd, tensor, edited, task.at)
        lost.check(target)

    def _compute_rows(
        self, fd: int, task: Task, info: TensorInfo, handle: FileIO, target: torch.dtype, workspace: Workspace,
        lost: Underflow, *, centred: bool,
    ) -> None:  # fmt: skip
        """Rows lie one behind the other in the file: they are read, edited and written while they are in the cache."""
        tensor, at = task.tensor, task.at
        pieces, edits, mean = list(_row_pieces(info.shape)), tensor.edits, None
        if centred:
            # Read twice, since a tensor that is centred by rows need not fit in memory.
            read = (read_tensor(info, rows, workspace.raw, handle) for rows in pieces)
            mean, edits = mean_of_rows(read, info.shape[0], workspace), edits[1:]
        for rows in pieces:
            value = read_tensor(info, rows, workspace.raw, handle)
            self._check(tensor, value)
            if tensor.edits:
                value = edit_rows(value, edits, self._lookup, target, workspace, mean, lost.see)
            else:
                value = workspace.empty("whole", tuple(value.shape), target).copy_(value)
            at += self._write_tensor(fd, tensor, value, at)

    def _check(self, tensor: OutTensor, value: Tensor) -> None:
        """Refuse NaN and infinities that the pass over the files does not look for."""
        # Values in a pickle have no place that the pass could look at. Buffers may hold infinities, but no edit may
        # read one: it would spread as NaN.
        parameter = self._is_parameter(tensor)
        if (parameter and self._source.is_pickle) or (tensor.edits and not parameter):
            check_finite(tensor.origin, value)

    def _check_fits(self, tensor: OutTensor, data: memoryview) -> None:
        """Refuse what became infinite."""
        if all_finite(data, tensor.dtype) or not self._is_parameter(tensor):
            return
        if any(edit["op"] == "bound" for edit in tensor.edits):  # infinite where there is none
            return
        original = None
        if not any(edit["op"] == "new" for edit in tensor.edits):
            # The source may be at fault: the pass over the files has perhaps not come to it yet.
            original = self._source.read(tensor.origin)
            check_finite(tensor.origin, original)
        raise overflows(tensor.name, original, torch_dtype(tensor.dtype))

    def _is_parameter(self, tensor: OutTensor) -> bool:
        return self._source.name_map.get(tensor.origin, "") not in self._no_parameters

    def _lookup(self, name: str) -> Tensor:
        """A source tensor by its model name; small ones are kept, in float64, since many edits share them."""
        if name not in self._small:
            origin = self._layout.origins[name]
            # The source's value, never the edited one: so it does not matter which tensor is done first.
            value = self._source.read(origin)
            check_finite(origin, value)
            if value.numel() > SMALL:
                return value
            # Two threads may both come here: they put the same values there.
            self._small[name] = value.to(torch.float64)
        return self._small[name]

    def _write_tensor(self, fd: int, tensor: OutTensor, value: Tensor, at: int) -> int:
        # As bytes: numpy has no bfloat16.
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._check_fits(tensor, data)
        _write_all(fd, data, at)
        self._wrote(tensor.name, len(data))
        return len(data)

    def _wrote(self, name: str, n: int) -> None:
        """Tell the thread that runs the workers; raise if they are to stop."""
        self._events.put((name, n))
        # Here, between two pieces: a large tensor would otherwise be finished after an error.
        if self._stop.is_set():
            raise _Stopped

    def _advance(self, name: str, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(name, self._done, self.total)


class _Supply:
    """Hands out tasks, of different files where it can: the kernel lets one thread at a time write to a file."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        files: dict[Path, deque[Task]] = {}
        for task in tasks:
            files.setdefault(task.file, deque()).append(task)
        self._files, self._lock = list(files.values()), threading.Lock()
        self._busy = [0] * len(files)

    def __iter__(self) -> Iterator[Task]:
        file = -1
        while True:
            with self._lock:
                if file >= 0:
                    self._busy[file] -= 1
                left = [i for i, tasks in enumerate(self._files) if tasks]
                if not left:
                    return
                file = min(left, key=lambda i: (self._busy[i], i != file, i))  # its own, if it is there alone
                self._busy[file] += 1
                task = self._files[file].popleft()
            yield task


def _row_pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about :data:`PIECE` elements each."""
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        # With its place in each call: there is no position in the file that another thread could move.
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
    # A smaller piece: this one is in memory.
    data = os.pread(origin, min(count, 1 << 22), from_offset)
    _write_all(target, memoryview(data), to_offset)
    return len(data)


__all__ = ["Progress", "Task", "Writer"]
