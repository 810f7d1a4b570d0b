"""The output folder: complete or not there at all (invariant I5), with every other file of the source."""

from __future__ import annotations

import glob
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from normconvert.errors import InputError

# Not a plain import: the module does not exist on every system, and type checkers know it on some only.
_FCNTL: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""Locks; elsewhere there are none, and leftovers stay."""

# Weights in any format: the converted ones replace them, the others would be stale.
WEIGHT_PATTERNS = (
    "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite",
    "*.ot", "*.gguf", "*.npz", "*.mlmodel", "*.safetensors.index.json", "*.bin.index.json",
)  # fmt: skip
SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__", ".ipynb_checkpoints"})


@contextmanager
def staged_output(out: Path, source: Path | None, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        out: the folder to be.
        source: the folder or file being read, which ``out`` must not touch.
        overwrite: an ``out`` that exists may be replaced, but only after the new one is complete.

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


def make_parents(folder: Path) -> list[Path]:
    """Make missing parents; returns those made, innermost first, to be removed again on failure."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error
    return missing


def replace(staging: Path, target: Path) -> None:
    """Rename into place; an old output steps aside first and comes back if that fails."""
    if not target.exists():
        os.rename(staging, target)
        return
    aside = target.parent / f".{target.name}.old-{os.getpid()}"
    # The lock goes along when the folder is renamed: another conversion's sweep then takes it for one in use.
    with locked(target):
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(aside, target)
            raise
        # The new output is in place: what cannot be deleted now is a leftover, no failure.
        shutil.rmtree(aside, ignore_errors=True)


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
            shutil.rmtree(folder, ignore_errors=True)
    raise InputError(f"{parent / name}: cannot be made: too many of them, or something removes it")


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Hold the lock of a folder, which ends with the process however it ends.

    Yields whether it was to be had; None where there are no locks.
    """
    handle = None
    try:
        held: bool | None = None
        with suppress(OSError):  # a file system without locks
            if _FCNTL is not None:
                handle = os.open(folder, os.O_RDONLY)
                try:
                    # On the folder itself: a lock file would be one more thing to be left behind.
                    _FCNTL.flock(handle, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
                    held = True
                except BlockingIOError:
                    held = False
        yield held
    finally:
        if handle is not None:
            os.close(handle)


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


def copy_other_files(folder: Path, out: Path) -> tuple[list[str], list[str]]:
    """Copy every file that is not weights: contents only, no times or permissions.

    Returns:
        Names copied, and names left out because they are links that lead out of the folder.
    """
    in_cache = folder.parent.name == "snapshots"  # the hub's cache, where every file is a link
    copied, refused = [], []
    for relative, path in list_files(folder).items():
        if any(fnmatch(path.name, pattern) for pattern in WEIGHT_PATTERNS) or not path.is_file():
            continue
        # Somebody else's checkpoint could have any file of this machine copied into what is published then.
        if not in_cache and not path.resolve().is_relative_to(folder.resolve()):
            refused.append(relative)
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / relative)
        copied.append(relative)
    return copied, refused


def list_files(folder: Path) -> dict[str, Path]:
    """Every file or link below a folder by relative name, but for what version control and caches keep there."""
    found = {}
    for root, folders, names in os.walk(folder):
        # In place: os.walk goes down into what is left of the list.
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        found.update({(Path(root) / name).relative_to(folder).as_posix(): Path(root) / name for name in sorted(names)})
    return found


def edit_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json's data with ``changes``: dotted key -> value."""
    # A deep copy: the source's config is used again.
    edited: dict[str, Any] = json.loads(json.dumps(config))
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = edited
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return edited


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
