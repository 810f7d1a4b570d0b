"""Are these still the same files? Answered without reading them where that is safe, and by their sha256 where not.

A file whose size, times and inode are as recorded has not been written to since: the time of the last change
(``st_ctime``) cannot be set by hand. That is worth nothing for a file that changed in the very moment it was recorded,
since clocks of file systems tick slowly; such a file is read and hashed, as is one that was moved or copied.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normconvert.apply.other_files import list_files
from normconvert.files.digest import sha256

TICK = 2_000_000_000
"""Nanoseconds that the slowest clock of a file system takes for a step."""

Stat = tuple[int, int, int, int]
"""Size, time of modification and of change in ns, inode."""


@dataclass(frozen=True)
class FileMark:
    """One file as it was: its stat when `Mark.seen` was noted, and its sha256."""

    stat: Stat
    sha256: str


@dataclass(frozen=True)
class Mark:
    """A folder (or a single file) as it was.

    Attributes:
        seen: when the files' stats were taken, ns since the epoch.
        files: relative name -> what it was.
    """

    seen: int
    files: dict[str, FileMark]

    def to_json(self) -> dict[str, Any]:
        """The mark as JSON-ready data."""
        return {
            "seen": self.seen,
            "files": {name: {"stat": list(file.stat), "sha256": file.sha256} for name, file in self.files.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mark:
        """The inverse of :meth:`to_json`."""
        return cls(data["seen"], {name: FileMark(tuple(f["stat"]), f["sha256"]) for name, f in data["files"].items()})


def _files(root: Path) -> dict[str, Path]:
    """Relative name -> file, for every file below a folder but for caches; for a file, itself."""
    found = list_files(root) if root.is_dir() else {root.name: root}
    return {name: path for name, path in found.items() if path.is_file() or path == root}


def stats(root: Path) -> dict[str, Stat]:
    """Relative name -> stat."""
    return {name: _stat(path) for name, path in _files(root).items()}


def take(root: Path, known: Mapping[str, str] | None = None) -> Mark:
    """The mark of what is there now.

    Args:
        root: a folder or a file.
        known: relative name -> sha256 of files that need not be read again.
    """
    # Before the files are looked at: what changes from now on has a later time.
    seen = time.time_ns()
    files = _files(root)
    # Before the content: a file that changes while it is hashed has other times afterwards, and is read again.
    before = {name: _stat(path) for name, path in files.items()}
    hashes = {name: (known or {}).get(name) or sha256(path) for name, path in files.items()}
    return Mark(seen, {name: FileMark(before[name], hashes[name]) for name in files})


@dataclass(frozen=True)
class Comparison:
    """What became of recorded files.

    Attributes:
        missing: names that are not there any more.
        changed: names with another content.
        added: names that were not there.
        fresh: a newer mark, if files had to be read and were found to be the same; else None.
    """

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]
    fresh: Mark | None = None

    @property
    def same(self) -> bool:
        """Whether nothing became of them."""
        return not (self.missing or self.changed or self.added)

    def words(self, passed_over: Collection[str] = ()) -> str:
        """The first difference in words; empty if there is none but in files that are passed over."""
        for names, what in ((self.changed, "changed"), (self.missing, "is missing"), (self.added, "is new")):
            for name in names:
                if name not in passed_over:
                    return f"{name} {what}"
        return ""


def compare(mark: Mark, root: Path) -> Comparison:
    """What became of the files of ``mark`` in ``root``; only those that may have changed are read."""
    seen = time.time_ns()
    there = _files(root)
    missing = tuple(name for name in mark.files if name not in there)
    added = tuple(name for name in there if name not in mark.files)
    changed, read = [], 0
    files: dict[str, FileMark] = {}
    for name, path in there.items():
        old = mark.files.get(name)
        if old is None:
            continue
        # As in take(): before the file is read.
        now = _stat(path)
        if now == old.stat and max(now[1], now[2]) < mark.seen - TICK:
            files[name] = old
            continue
        read += 1
        # Another size needs no reading.
        if now[0] != old.stat[0] or sha256(path) != old.sha256:
            changed.append(name)
        files[name] = FileMark(now, old.sha256)
    found = Comparison(missing, tuple(changed), added)
    return Comparison(missing, (), added, Mark(seen, files)) if found.same and read else found


def _stat(path: Path) -> Stat:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
