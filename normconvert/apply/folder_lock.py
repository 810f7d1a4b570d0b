"""Locks on folders: held by a process, and gone with it however it ends.

The folder itself is locked: a lock file would be one more thing to be left behind.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.interrupts import held as uninterrupted

# Not a plain import: the module does not exist on every system, and type checkers know it on some only.
_FCNTL: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""Locks; elsewhere there are none, and leftovers stay."""


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Hold the lock of a folder, if it is to be had.

    Yields whether it was; None where there are no locks.
    """
    handle, held = -1, None
    try:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            held = _lock(handle)
        yield held
    finally:
        if handle >= 0:
            os.close(handle)


@contextmanager
def workplace(folder: Path, out: Path, patience: float = 0.0) -> Iterator[None]:
    """Make a folder to prepare ``out`` in, or enter one that was left, with nobody else in it.

    Args:
        folder: the folder; it is the caller's to remove.
        out: the output, for messages.
        patience: seconds to wait for another process that is in it.

    Raises:
        InputError: another process is in it, or it cannot be made.
    """
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
            if _lock(handle) is False:
                if time.monotonic() >= until:
                    raise InputError(f"{out}: another process is making it: wait for it, or end it")
            # The last owner may have removed the folder between open and lock, and another have made it anew: a lock on
            # what is gone keeps nobody out.
            elif _is(folder, handle):
                yield
                return
        finally:
            os.close(handle)
        time.sleep(0.05)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, to the end; what cannot be removed is a leftover, no failure."""
    with uninterrupted():
        shutil.rmtree(folder, ignore_errors=True)


def _lock(handle: int) -> bool | None:
    """Whether the lock was to be had; None if this file system has none."""
    if _FCNTL is None:
        return None
    try:
        _FCNTL.flock(handle, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(handle))
    except FileNotFoundError:
        return False
