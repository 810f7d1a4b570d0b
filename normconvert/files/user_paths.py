"""Paths as a user types them."""

from __future__ import annotations

import os
from pathlib import Path

from normconvert.errors import InputError

STDOUT = "-"
"""What a user writes for stdout in place of a file."""


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path with ``~`` expanded.

    Raises:
        InputError: it names the home of nobody, or is the name of no file on any system.
    """
    try:
        path = Path(text).expanduser()
        if "\0" in str(path):
            raise ValueError("a NUL character in a name")
        path.resolve()  # whoever uses it will: links that lead in a circle are found here
    except (RuntimeError, ValueError, OSError) as error:
        first = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise InputError(f"{str(text)!r}: no path: {first}") from error
    return path
