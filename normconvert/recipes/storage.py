"""Where an output lies: a folder of this machine or of a shared disk, or any place that fsspec reaches.

An object store has no rename. There an output counts as complete when its last file is there, the job's state
(:mod:`normconvert.recipes.state`), which is written last and removed first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from normconvert.errors import InputError, first_line

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_url(place: str) -> bool:
    """Whether a place is an fsspec URL rather than a path."""
    return _URL.match(place) is not None


class Store:
    """One output folder behind an fsspec URL.

    Args:
        url: such as ``s3://bucket/out/gpt2``.

    Raises:
        InputError: no file system of that kind is installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        try:
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: {first_line(error)}") from error

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it is not there.

        Raises:
            InputError: the store cannot be reached.
        """
        try:
            self._fs.invalidate_cache()
            data: bytes = self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._failure("read", error) from error
        return data

    def files(self) -> dict[str, tuple[int, str]]:
        """Every file: relative name -> (bytes, what the store says to tell versions apart, such as an ETag).

        Raises:
            InputError: the store cannot be reached.
        """
        try:
            # fsspec remembers listings, and other processes write to the store.
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._failure("listed", error) from error
        return {
            os.path.relpath(path, self._root): (int(info.get("size") or 0), _version(info))
            for path, info in found.items()
        }

    def put(self, folder: Path, first: str, last: str) -> None:
        """Upload a folder, replacing what is there.

        Args:
            folder: everything in it but ``last`` is uploaded.
            first: the file that says whose output this is, so that one that is cut off is known again.
            last: the file that says that all is there; removed before anything is written.

        Raises:
            InputError: the store cannot be written to.
        """
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        names = [first, *sorted(found - {first, last})]
        try:
            # Noted before anything is written, while the list is that of the old output alone.
            stale = [name for name in self.files() if name not in (*names, last)]
            # From here until it is written again the output counts as incomplete.
            if self._fs.exists(self._at(last)):
                self._fs.rm_file(self._at(last))
            for name in names:
                self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(folder / name), self._at(name))
            # When the new ones are there: what is cut off before leaves too much, never too little.
            for name in stale:
                self._fs.rm_file(self._at(name))
        except InputError:
            raise
        except Exception as error:
            raise self._failure("written", error) from error

    def write(self, name: str, data: bytes) -> None:
        """One small file.

        Raises:
            InputError: the store cannot be written to.
        """
        try:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._at(name), data)
        except Exception as error:
            raise self._failure("written", error) from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _failure(self, what: str, error: Exception) -> InputError:
        reason = first_line(error)
        return InputError(f"{self.url}: cannot be {what}: {reason}")


def _version(info: dict[str, Any]) -> str:
    """What tells versions of an object apart, if the store says it; else empty."""
    return str(next((info[key] for key in ("ETag", "etag", "md5Hash", "content_md5") if info.get(key)), ""))
