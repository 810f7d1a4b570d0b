"""Conversions of checkpoints on the hub that are larger than the disk's free space, shard by shard.

Beside OUT stands a folder ``.OUT.stream`` that outlives the process: ``source/`` with a shell for each shard (see
:mod:`normconvert.sources.remote`), ``out/``, which becomes OUT, and ``state.json``, which says what is done and for
which conversion. The same conversion goes on there; another one starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert import __version__
from normconvert.apply.folder_lock import workplace
from normconvert.apply.output_folder import check_output, make_parents, replace, sweep
from normconvert.apply.source_reader import SourceReader
from normconvert.errors import FidelityError, NormConvertError, Unfinished

if TYPE_CHECKING:
    from normconvert.apply.writer import Task, Writer
    from normconvert.options import Opening
    from normconvert.sources import Source
    from normconvert.sources.remote import RemoteShards

SPARE = 1 << 26
"""Bytes that must stay free on the disk."""


@contextmanager
def streamed(
    out: Path | None, overwrite: bool = False, verify: bool = True, say: Callable[[str], None] | None = None
) -> Iterator[Stream]:
    """A streamed conversion to ``out``, or one that only plans.

    What it has done stays beside ``out`` if it is interrupted, or stopped by the network or a full disk.

    Args:
        out: the folder to make; None: nothing is kept.
        overwrite: replace an ``out`` that exists, once the new one is complete.
        verify: keep the shards for the verification, if the disk has room.
        say: called with what is done next.

    Raises:
        InputError: ``out`` exists, or another conversion to it is running.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Stream(Path(temporary), None, False, False, say)
        return
    # Without a source: it is on the hub, and nothing here can overlap with it.
    check_output(out, None, overwrite)
    target = out.resolve()
    made = make_parents(target.parent)
    folder = target.parent / f".{target.name}.stream"
    with workplace(folder, out):
        sweep(target)
        stream = Stream(folder, target, overwrite, verify, say)
        keep = False
        try:
            yield stream
        except BaseException as error:
            # Ctrl-C and SIGTERM as well: to be stopped and go on is what the folder is for.
            keep = stream.is_worth_keeping(error)
            if keep:
                # The same error with more to say: its class decides the exit status.
                error.args = (f"{str(error) + '; ' if str(error) else ''}{stream.leftover()}",)
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
                for parent in made:
                    with suppress(OSError):
                        parent.rmdir()


class Stream:
    """One streamed conversion: opens the source without its weights, and writes what it can as shards come.

    Attributes:
        verifiable: whether source and output fit the disk together; then all shards are there after :meth:`write`.
        done: shard -> sha256, of those that are converted.
    """

    def __init__(
        self, folder: Path, target: Path | None, overwrite: bool, verify: bool, say: Callable[[str], None] | None
    ) -> None:
        self._folder, self._target, self._overwrite, self._verify = folder, target, overwrite, verify
        self._say = say or (lambda text: None)
        self._state = folder / "state.json"
        self._key, self.done = self._read_state()
        self._shards: RemoteShards | None = None
        self._writing = False
        self.verifiable = False

    def open(self, reference: str, how: Opening) -> Source:
        """See :func:`normconvert.sources.remote.open_remote`."""
        from normconvert.sources.remote import open_remote

        (self._folder / "source").mkdir(exist_ok=True)
        source, self._shards = open_remote(reference, self._folder / "source", how=how)
        return source

    @contextmanager
    def output(self, source: Source, choices: Mapping[str, Any]) -> Iterator[Path]:
        """The folder that becomes the output when the block ends well.

        It holds what an earlier run has done, if that was of the same commit, by the same version and with the same
        ``choices`` (JSON-ready: plan, dtype, ...).
        """
        import torch

        assert self._target is not None
        self._writing = True
        # Everything the bytes depend on: shards of two conversions in one output would be a model that nobody checked.
        facts = {"source": source.revision, "versions": [__version__, torch.__version__], **choices}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        out = self._folder / "out"
        if key != self._key:
            self._key, self.done = key, {}
            # Before the files: a run that is killed in between must not find shards called done that are gone.
            self._state.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(exist_ok=True)
        yield out
        check_output(self._target, None, self._overwrite)  # again: it may have been hours
        replace(out, self._target)

    def write(self, source: Source, writer: Writer, required: Iterable[str]) -> dict[str, str]:
        """Fetch the shards one by one and write what is made of each.

        Args:
            source: as :meth:`open` gave it.
            writer: of its layout.
            required: checkpoint names of the tensors that must be finite.

        Returns:
            File -> sha256, for the weight files and config.json.

        Raises:
            Unfinished: the network or the disk is in the way; what is done is kept.
            InputError: a weight is NaN or infinite, or overflows the output's dtype.
        """
        assert self._shards is not None
        required = frozenset(required)
        tasks = writer.start()
        files = [file.name for file in source.files]
        of_shard: dict[str, list[Task]] = {name: [] for name in files}
        # By the shard that a tensor starts from; what its edits look up in others comes by range requests.
        for task in tasks:
            of_shard[source.tensors[task.tensor.origin].file.name].append(task)
        self.verifiable = self._room(writer.total, files) and self._verify
        for number, name in enumerate(files, 1):
            if name in self.done:
                writer.skip(of_shard[name])
            else:
                self._say(f"shard {number} of {len(files)}: {name}")
                self._convert(source, name, of_shard[name], writer, required)
            # What an earlier run has done as well: the verification reads all of the source.
            if self.verifiable:
                self._shards.fetch(name)
            else:
                self._shards.drop(name)
        hashes = {name: self.done[name] for name in files}
        config = self._folder / "source" / "config.json"
        if config.is_file():
            hashes[config.name] = hashlib.sha256(config.read_bytes()).hexdigest()
        return hashes

    def _convert(self, source: Source, name: str, tasks: list[Task], writer: Writer, required: frozenset[str]) -> None:
        assert self._shards is not None
        self._shards.fetch(name)
        with SourceReader() as reader:
            reader.begin(info for info in source.tensors.values() if info.file.name == name)
            reader.require(source.tensors[name] for name in required)
            writer.run(tasks, reader)
            # Before the shard counts as done: a value that is not finite may be in its last bytes.
            reader.finish()
        # Of what was read while it was converted, not of another look at the file. What was written is written again.
        expected = self._shards.files[name].sha256
        if expected not in (None, reader.hashes[name]):
            self._shards.drop(name)
            raise Unfinished(f"{name}: damaged: its sha256 is {reader.hashes[name]}, the hub says {expected}")
        for file in {task.file for task in tasks}:
            with file.open("r+b") as handle:
                os.fsync(handle.fileno())  # before it is said to be done: the machine may go down as well
        self.done[name] = reader.hashes[name]
        self._write_state()

    def _room(self, total: int, files: list[str]) -> bool:
        """Whether output and source fit the disk together.

        Raises:
            Unfinished: not even the output and the largest shard do.
        """
        assert self._shards is not None
        out = self._folder / "out"
        # Blocks, not lengths: the files have their full length from the start, with holes where shards are to come.
        there = sum(path.stat().st_blocks * 512 for path in out.glob("*.safetensors")) if os.name == "posix" else 0
        free = shutil.disk_usage(self._folder).free - SPARE - max(0, total - there)
        absent = {name: self._shards.files[name].size for name in files if not self._shards.on_disk(name)}
        largest = max((size for name, size in absent.items() if name not in self.done), default=0)
        if free < largest:
            raise Unfinished(
                f"{self._target}: {(largest - free) / 1e9:.2f} GB more must be free on the disk: the output needs "
                f"{total / 1e9:.2f} GB and a shard up to {largest / 1e9:.2f} GB"
            )
        return free >= sum(absent.values())

    def is_worth_keeping(self, error: BaseException) -> bool:
        """Whether to go on later makes sense after ``error``, and something is done."""
        # What would end the same way again is not worth its disk. Before the writing begins, other options may help.
        final = isinstance(error, FidelityError) or (
            self._writing and isinstance(error, NormConvertError) and not isinstance(error, Unfinished)
        )
        return bool(self.done) and not final

    def leftover(self) -> str:
        """What is kept, in words."""
        count = f"{len(self.done)} shard{'s' if len(self.done) > 1 else ''}"
        return f"{count} done and kept in {self._folder}: the same command goes on there"

    def _read_state(self) -> tuple[str, dict[str, str]]:
        try:
            # Whatever cannot be read counts as nothing done: that costs time and no more.
            state = json.loads(self._state.read_text(encoding="utf-8"))
            return str(state["key"]), {str(name): str(digest) for name, digest in state["done"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "", {}

    def _write_state(self) -> None:
        # Aside and renamed: a half-written state would lose what took hours.
        fresh = self._state.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as handle:
            json.dump({"key": self._key, "done": self.done}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(fresh, self._state)
