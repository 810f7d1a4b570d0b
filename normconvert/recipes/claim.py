"""The right to make one output: a folder beside it that no other process works in, and its rename into place.

The folder is locked by the operating system, so the claim of a process that was killed ends with it, and what it left
is cleared away by whoever claims the output next.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normconvert.errors import InputError

# Where there are no such locks, two runs for one output at a time are the user's to avoid.
_FCNTL: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
PATIENCE = 20.0
"""Seconds to wait for a claim: a process that was just killed may take a moment to be gone."""
NEW, OLD = "new", "old"


@contextmanager
def claim(out: Path, patience: float = PATIENCE) -> Iterator[Path]:
    """An empty folder to make ``out`` in, removed at the end, whatever happens.

    Args:
        out: the output folder; what is made for it belongs into ``claim / NEW``.
        patience: seconds to wait for another process that has the claim.

    Raises:
        InputError: another process is making ``out``, or its parent folder cannot be written to.
    """
    folder = staging(out)
    # Outside the try: who has no lock has nothing to remove.
    handle = _lock(folder, out, patience)
    try:
        # Before the folder is cleared: what stepped aside in it is the only copy of the old output.
        _restore(folder, out)
        _clear(folder)
        yield folder
    finally:
        # Again: publish() may have been stopped between its two renames.
        _restore(folder, out)
        shutil.rmtree(folder, ignore_errors=True)  # before the lock goes, so that nobody else finds it half removed
        os.close(handle)


def staging(out: Path) -> Path:
    """The folder that an output is made in."""
    return out.parent / f".{out.name}.job"


def publish(folder: Path, out: Path) -> None:
    """Make ``folder / NEW`` the output. What was there before steps aside and comes back if that fails.

    Raises:
        OSError: it cannot be renamed.
    """
    # An empty folder is replaced by the rename itself.
    if out.is_dir() and any(out.iterdir()):
        # Into the claimed folder: there the next claim finds it if this process is killed before the second rename.
        os.rename(out, folder / OLD)
    os.rename(folder / NEW, out)


def discard(out: Path) -> None:
    """Clear away what a process that was killed left of an output. Leaves alone what another process works in."""
    with suppress(InputError, OSError), claim(out, patience=2.0):
        pass


def _lock(folder: Path, out: Path, patience: float) -> int:
    until = time.monotonic() + patience
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # removed by another process in between
            continue
        except OSError as error:
            raise InputError(f"{out}: cannot be made: {error.strerror or error}") from error
        try:
            _flock(handle)
            # The last owner may have removed the folder between open and lock, and another have made it anew: a lock
            # on what is gone keeps nobody out.
            if os.stat(folder).st_ino == os.fstat(handle).st_ino:
                return handle
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise InputError(f"{out}: another process is making it: wait for it, or end it") from None
            time.sleep(0.1)
        except FileNotFoundError:  # removed after it was opened
            pass
        os.close(handle)


def _flock(handle: int) -> None:
    """Lock, if the file system can.

    Raises:
        BlockingIOError: somebody else has.
    """
    if _FCNTL is None:
        return
    try:
        _FCNTL.flock(handle, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
    except OSError as error:
        # Any other error means that this file system has no locks: then as where there are none.
        if isinstance(error, BlockingIOError):
            raise


def _restore(folder: Path, out: Path) -> None:
    """Bring back an old output that stepped aside for one that never came."""
    if (folder / OLD).is_dir() and not out.exists():
        os.rename(folder / OLD, out)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        # A link is removed, never what it leads to.
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
