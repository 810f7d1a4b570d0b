"""The output folder: complete or not there at all (invariant I5), with every other file of the source."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normconvert.apply.folder_lock import locked, remove
from normconvert.errors import InputError
from normconvert.files.weight_files import load_json
from normconvert.interrupts import held as uninterrupted

MADE_BY = ("normconvert.json", "normconvert_adapter.json")
"""The records of conversions: a folder with one of them may be made again."""


@contextmanager
def staged_output(out: Path, source: Path | None, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        out: the folder to be.
        source: the folder or file being read, which ``out`` must not touch.
        overwrite: an ``out`` that a conversion made may be replaced, but only after the new one is complete.

    Raises:
        InputError: ``out`` exists, or overlaps with the source, or cannot be made.
    """
    out = Path(out)
    check_output(out, source, overwrite)
    # Where OUT is a link, what it leads to is replaced: a rename would put a folder in place of the link.
    target = out.resolve()
    made = make_parents(target.parent)
    sweep(target)
    try:
        # Beside OUT, thus on its file system: only there a rename is one step.
        with claimed_folder(target.parent, f".{target.name}.partial-{os.getpid()}") as staging:
            yield staging
            check_output(out, source, overwrite)  # again: somebody may have made it meanwhile
            replace(staging, target)
    except BaseException:  # Ctrl-C too: nothing half-way may stay
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def check_output(out: Path, source: Path | None, overwrite: bool = False) -> None:
    """Refuse an output that would destroy something; callable before any work is done.

    Raises:
        InputError: see :func:`staged_output`.
    """
    target = out.resolve()
    # An empty name is the current folder, too: that of a variable that was never set.
    if Path.cwd().is_relative_to(target):
        raise InputError(f"OUT ({str(out)!r}) is empty, or the current folder, or one around it; name another folder")
    if source is not None:
        origin = source.resolve()
        if target == origin:
            raise InputError(f"{out}: the output is the source itself; name another folder")
        # Replacing the output would delete the source with it.
        if origin.is_relative_to(target) and (source.is_dir() or target.exists()):
            raise InputError(f"{out}: the source {source} lies inside the output; name another folder")
        # The source is only read; and its files are copied into the output, which would then hold itself.
        if source.is_dir() and target.is_relative_to(origin):
            raise InputError(f"{out}: the output lies inside the source {source}; name another folder")
    if target.exists() and not target.is_dir():
        raise InputError(f"{out}: exists and is a file; name a folder")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise InputError(f"{out}: exists and is not empty; name another folder or pass --overwrite")
    if not may_be_replaced(target):
        raise InputError(
            f"{out}: exists and was not made by normconvert, and --overwrite replaces nothing else: remove it or name "
            "another folder"
        )


def may_be_replaced(folder: Path) -> bool:
    """Whether nothing is lost with a folder: it is empty, not there, or an output, which can be made again."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return True
    for name in MADE_BY:
        with suppress(InputError):
            if "format" in load_json(folder / name):
                return True
    return False


def make_parents(folder: Path) -> list[Path]:
    """Make missing parents; returns those made, innermost first, to be removed again on failure."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error
    return missing


def replace(staging: Path, target: Path, ours: Callable[[Path], bool] | None = None) -> None:
    """Put a folder in the place of another, in one step where the system can; what was there before is removed.

    Args:
        staging: the new folder, beside the other.
        target: its place.
        ours: whether a folder may be replaced; by default :func:`may_be_replaced`.

    Raises:
        InputError: what is there now may not be replaced: somebody has just put it there.
        OSError: it cannot be renamed.
    """
    ours = ours or may_be_replaced
    with uninterrupted(), locked(target):  # a lock goes along: to another conversion's sweep this is one in use
        if not target.exists():
            os.rename(staging, target)  # which fails if a folder with files in it appears now
        elif _exchange(staging, target):
            # The names have changed places: what was looked at before may be another folder than what was there then.
            if not ours(staging):
                _exchange(staging, target)
                raise InputError(f"{target}: something else was put there meanwhile; it was left as it is")
            remove(staging)
        else:
            _step_aside(staging, target, ours)


def _step_aside(staging: Path, target: Path, ours: Callable[[Path], bool]) -> None:
    """Two renames, where the system has no better way; killed between them, :func:`sweep` brings the old one back."""
    aside = target.parent / f".{target.name}.old-{os.getpid()}"
    os.rename(target, aside)
    try:
        if not ours(aside):
            raise InputError(f"{target}: something else was put there meanwhile; it was left as it is")
        os.rename(staging, target)
    except BaseException:
        os.rename(aside, target)
        raise
    remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot.

    Raises:
        OSError: it can, and failed.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # Linux: not in Python's os
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def claimed_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder that is locked while the block runs, and removed at its end if it is still there.

    Raises:
        InputError: it cannot be made.
    """
    for attempt in range(100):
        folder = parent / (f"{name}-{attempt}" if attempt else name)
        try:
            # Never exist_ok: making the folder is what decides which of two threads has it.
            folder.mkdir()
        except FileExistsError:  # another thread's
            continue
        except OSError as error:
            raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error
        try:
            with locked(folder):
                if folder.is_dir():  # between its making and the lock it could be taken for a leftover
                    yield folder
                    return
        finally:
            remove(folder)
    raise InputError(f"{parent / name}: cannot be made: too many of them, or something removes it")


def sweep(target: Path) -> None:
    """Remove what conversions to ``target`` left beside it when they were killed; those that run are let be."""
    for kind in ("partial", "old"):
        for folder in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            with suppress(OSError), locked(folder) as ours:
                # Without locks (None) nobody can tell a leftover from a conversion that runs: it stays.
                if not ours:
                    continue
                if kind == "old" and not target.exists():  # killed between two renames: this is the old output
                    os.rename(folder, target)
                else:
                    shutil.rmtree(folder)


def set_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of config.json's data whose dtype entries, where there are any, say ``dtype``."""
    edited: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            edited[key] = dtype
        else:
            # A model of several parts says its dtype in each part's config.
            edited[key] = set_dtype(value, dtype) if isinstance(value, dict) else value
    return edited


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON as transformers does: two spaces, a newline at the end; key order as given."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
