"""The right to make one output: a folder beside it that no other process works in, and its rename into place.

The folder is locked by the operating system, so the claim of a process that was killed ends with it, and what it left
is cleared away by whoever claims the output next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from normconvert.apply.folder_lock import remove, workplace
from normconvert.apply.output_folder import sweep
from normconvert.errors import InputError

PATIENCE = 20.0
"""Seconds to wait for a claim: a process that was just killed may take a moment to be gone."""
NEW = "new"


@contextmanager
def claim(out: Path, patience: float = PATIENCE) -> Iterator[Path]:
    """An empty folder to make ``out`` in, removed at the end, whatever happens.

    Args:
        out: the output folder; what is made for it belongs into ``claim / NEW``, and is put in place by
            :func:`normconvert.apply.output_folder.replace`.
        patience: seconds to wait for another process that has the claim.

    Raises:
        InputError: another process is making ``out``, or its parent folder cannot be written to.
    """
    folder = staging(out)
    with workplace(folder, out, patience):
        try:
            sweep(out)
            for leftover in folder.iterdir():
                # A link is removed, never what it leads to.
                remove(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            yield folder
        finally:
            remove(folder)  # before the lock goes, so that nobody else finds it half removed


def staging(out: Path) -> Path:
    """The folder that an output is made in."""
    return out.parent / f".{out.name}.job"


def discard(out: Path) -> None:
    """Clear away what a process that was killed left of an output. Leaves alone what another process works in."""
    with suppress(InputError, OSError), claim(out, patience=2.0):
        pass
