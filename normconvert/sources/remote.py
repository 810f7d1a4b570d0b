"""Weight files that stay on the hub until their turn: headers and single tensors by range requests, shards one by one.

A *shell* stands in for each file: its true header and size, and a hole where the data belongs. So a checkpoint is
opened, planned and laid out as if it were here, at the cost of its headers. Nobody may read a hole: ``Source.fetch``
asks for a tensor before it is read, and a file is read only between :meth:`RemoteShards.fetch` and its ``drop``.
"""

from __future__ import annotations

import glob
import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normconvert.errors import InputError, Unfinished
from normconvert.files.safetensors_file import MAX_HEADER
from normconvert.files.tensor_info import TensorInfo
from normconvert.files.user_paths import user_path
from normconvert.options import Opening
from normconvert.sources.hub import explained, wanted_files
from normconvert.sources.opening import hub_id, open_folder
from normconvert.sources.source import Source

FIRST = 100_000  # bytes asked for at first: most headers are shorter
PIECE = 1 << 26  # bytes of a tensor asked for at a time


@dataclass(frozen=True)
class RemoteFile:
    """A weight file on the hub.

    Attributes:
        name: in the repository.
        size: in bytes.
        sha256: of its content, where the hub says it (files in large-file storage); else None.
        header: its first bytes, up to the data.
    """

    name: str
    size: int
    sha256: str | None
    header: bytes


class RemoteShards:
    """The weight files of one commit of a repository.

    Args:
        repo: hub id.
        commit: of the repository.
        folder: where the shells stand, beside the small files of the repository.
        scratch: where shards are downloaded to; never the hub's cache, which is only read.
    """

    def __init__(self, repo: str, commit: str, folder: Path, scratch: Path) -> None:
        self.repo, self.commit, self.folder = repo, commit, folder
        self.files: dict[str, RemoteFile] = {}
        self._scratch = scratch
        self._tensors: dict[str, TensorInfo] = {}
        self._here: set[str] = set()  # files whose data is there
        self._fetched: set[str] = set()  # tensors whose data is in a shell
        self._lock = threading.Lock()

    def prepare(self, names: Iterable[str]) -> None:
        """Make the shells of the weight files.

        Raises:
            InputError: the hub cannot be reached, does not answer range requests, or a header is corrupt.
        """
        for leftover in self._scratch.rglob("*.incomplete"):
            leftover.unlink()
        for name in names:
            self.files[name] = self._describe(name)
            self._make_shell(name)

    def attach(self, source: Source) -> Source:
        """``source`` such that its tensors are fetched before they are read."""
        self._tensors = source.tensors
        return replace(source, fetch=self.need)

    def need(self, name: str) -> None:
        """See that the data of one tensor (checkpoint name) is there: by range requests, if its file is not."""
        info = self._tensors[name]
        with self._lock:
            # A file that is here is a link, into the hub's cache perhaps: to write through it would spoil that.
            if info.file.name in self._here or name in self._fetched:
                return
            with info.file.open("r+b") as handle:
                handle.seek(info.start)
                for start in range(info.start, info.end, PIECE):
                    handle.write(self._range(info.file.name, start, min(start + PIECE, info.end)))
            # When all of it is there: a request that failed half-way is made again.
            self._fetched.add(name)

    def cached(self, name: str) -> Path | None:
        """The file in the hub's cache, if it is there whole."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        path = Path(found) if isinstance(found, str) else None
        # A file that was cut off, by a full disk say, is not the one that is meant.
        size = self.files[name].size if name in self.files else None
        return path if path is not None and size in (None, path.stat().st_size) else None

    def on_disk(self, name: str) -> bool:
        """Whether the file need not be fetched, because it is in the cache or was fetched before."""
        scratch = self._scratch / name
        return self.cached(name) is not None or (scratch.is_file() and scratch.stat().st_size == self.files[name].size)

    def fetch(self, name: str) -> None:
        """Put the whole file in place of its shell, downloaded if it is not in the cache.

        Raises:
            InputError: it cannot be fetched, or is not the file that was described.
        """
        place = self.folder / name
        with self._lock:
            if name in self._here:
                return
        file, path = self.files[name], self.cached(name) or self._download(name)
        with path.open("rb") as handle:
            # The layout was made from the header that was described: another one would put every tensor elsewhere.
            if path.stat().st_size != file.size or handle.read(len(file.header)) != file.header:
                raise InputError(f"{path}: not what the hub describes as {name} of {self.repo}: delete it")
        link = place.with_name(f".{name}.link")
        link.unlink(missing_ok=True)
        # A link made aside and renamed: at no moment is there neither a shell nor a file for another thread to open.
        link.symlink_to(path.resolve())
        with self._lock:
            os.replace(link, place)
            self._here.add(name)

    def drop(self, name: str) -> None:
        """Put the shell back, and delete the file if it was fetched: one in the cache stays."""
        self._make_shell(name)
        # The shell first: a link to a file that is gone cannot be opened.
        (self._scratch / name).unlink(missing_ok=True)

    def _download(self, name: str) -> Path:
        import huggingface_hub

        with explained(self.repo, self.commit):
            return Path(huggingface_hub.hf_hub_download(self.repo, name, revision=self.commit, local_dir=self._scratch))

    def _make_shell(self, name: str) -> None:
        """Put a shell where the file is to be, in place of whatever stands there."""
        file, place = self.files[name], self.folder / name
        # Aside: at the place may be a link into the hub's cache, and opening it for writing would empty that file.
        fresh = place.with_name(f".{name}.shell")
        with fresh.open("wb") as handle:
            handle.write(file.header)
            handle.truncate(file.size)
        with self._lock:
            os.replace(fresh, place)
            self._here.discard(name)
            # What was fetched went with the old shell.
            self._fetched -= {tensor for tensor in self._fetched if self._tensors[tensor].file.name == name}

    def _describe(self, name: str) -> RemoteFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        path = self.cached(name)
        if path is not None:
            with path.open("rb") as handle:
                first = handle.read(8)
                header = first + handle.read(_header_length(name, first, path.stat().st_size))
            # The cache names its blobs by their etag.
            digest = path.resolve().name
            return RemoteFile(name, path.stat().st_size, _sha256(digest), header)
        with explained(self.repo, self.commit):
            described = get_hf_file_metadata(hf_hub_url(self.repo, name, revision=self.commit))
        # Headers of one commit and data of another would fit each other only by chance.
        if described.size is None or described.commit_hash not in (None, self.commit):
            raise InputError(f"{self.repo}: the hub does not say how large {name} is, which --stream needs")
        data = self._range(name, 0, min(FIRST, described.size))
        end = 8 + _header_length(name, data[:8], described.size)
        if end > len(data):
            data += self._range(name, len(data), end)
        return RemoteFile(name, described.size, _sha256(described.etag or ""), data[:end])

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            InputError: the hub cannot be reached, or sends something else.
        """
        from huggingface_hub import constants, hf_hub_url, utils

        hub: Any = utils  # typed in part

        # Not compressed on the way: the range is of the file's own bytes.
        headers = {**hub.build_hf_headers(), "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        url = hf_hub_url(self.repo, name, revision=self.commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            explained(self.repo, self.commit),
            # Streamed, so that the status is seen before a body of gigabytes; retries are the library's own.
            hub.http_stream_backoff("GET", url, headers=headers, timeout=timeout) as answer,
        ):
            hub.hf_raise_for_status(answer)
            if answer.status_code != 206:  # the whole file is on its way: do not take it
                raise InputError(f"{self.repo}: the server does not answer range requests, which --stream needs")
            data = bytes(answer.read())
        if len(data) != stop - start:
            raise Unfinished(f"{self.repo}: asked for {stop - start} bytes of {name}, got {len(data)}")
        return data


def open_remote(
    reference: str,
    folder: Path,
    *,
    how: Opening,
) -> tuple[Source, RemoteShards]:
    """Open a checkpoint on the hub without its weights.

    Args:
        reference: a hub id.
        folder: for the shells and small files, and below it ``.cache/shards`` for what is downloaded.
        how: as for :func:`normconvert.sources.open_source`.

    Raises:
        InputError: not a hub id, no safetensors, or anything that is wrong with the files, in one line.
    """
    import huggingface_hub

    if reference.startswith("demo:") or user_path(reference).exists():
        raise InputError(f"{reference}: --stream is for models on the hub, and this one is here: convert it without")
    repo, revision = hub_id(reference, how.revision)
    with explained(repo, revision):
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
    # From here on by commit: a branch may move while shards are fetched for hours.
    commit = info.sha
    wanted = wanted_files([sibling.rfilename for sibling in info.siblings or []], how.variant)
    weights = [name for name in wanted if name.endswith(".safetensors") and "/" not in name]
    if not weights or commit is None:
        raise InputError(f"{reference}: no safetensors files on the hub, which --stream needs; convert it without")
    small = [name for name in wanted if name not in weights]
    with explained(repo, commit):
        cached = Path(
            huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=[*map(glob.escape, small)])
        )
    for name in small:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # Copies: links into the cache would lead out of this folder and be refused as such.
        shutil.copyfile(cached / name, folder / name)
    shards = RemoteShards(repo, commit, folder, folder / ".cache" / "shards")
    shards.prepare(weights)
    source = open_folder(reference, folder, commit, how, None, shards.attach)
    return source, shards


def _header_length(name: str, first: bytes, size: int) -> int:
    """The header's length, from the first eight bytes of a file."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(size - 8, MAX_HEADER):
        raise InputError(f"{name}: not a safetensors file: it has {size} bytes but its header claims {length}")
    return length


def _sha256(etag: str) -> str | None:
    """The etag if it is a sha256, as for files in large-file storage."""
    with suppress(ValueError):
        if len(etag) == 64 and int(etag, 16) >= 0:
            return etag
    return None
