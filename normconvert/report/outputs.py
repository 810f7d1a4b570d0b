"""The files that a command writes beside its work: each is made from the command's JSON document and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.files.user_paths import user_path
from normconvert.files.weight_files import read_text

Document = dict[str, Any]


@dataclass(frozen=True)
class FileOutput:
    """A file made from the document.

    Attributes:
        option: what the user typed to get it, for errors.
        path: where it goes.
        render: makes its text.
        mark: a text that every such file holds: a file that exists is written over only if it has it.
        arguments: what the user typed: no report is written over or into anything else that is named there.
    """

    option: str
    path: str
    render: Callable[[Document], str]
    mark: str
    arguments: Sequence[str] = ()

    def check(self) -> None:
        """Refuse a path that cannot be written, before any work is done.

        Raises:
            InputError: its folder does not exist or is not writable, or it is a folder itself.
        """
        path = user_path(self.path)
        problem = None
        if path.is_dir():
            problem = "is a folder"
        elif not path.absolute().parent.is_dir():
            problem = "its folder does not exist"
        elif not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            problem = "permission denied"
        problem = problem or self._destroys(path)
        if problem:
            raise InputError(f"{self.option} {self.path}: cannot be written: {problem}")

    def _destroys(self, path: Path) -> str | None:
        """Why nothing may be written there: it would be a source, another input, or what no command has written."""
        own, target = 0, path.resolve()
        for word in self.arguments:
            with suppress(OSError, InputError):  # what is no name of a file
                named = user_path(word.partition("=")[2] if word.startswith("--") else word)
                own += named.name != "" and named.resolve() == target
                if named.name and named.is_dir() and target.is_relative_to(named.resolve()):
                    return f"it lies inside {named}, which is only read"
        if own > 1:
            return "it is named twice, for two things"
        if path.is_file() and path.stat().st_size > 0:
            with suppress(InputError):
                if self.mark in read_text(path):
                    return None
            return "it exists and is no such report; remove it or name another file"
        return None

    def write(self, document: Document) -> None:
        """Write it, completely or not at all.

        Raises:
            InputError: that failed.
        """
        self.check()
        try:
            write_whole(user_path(self.path), self.render(document))
        except OSError as error:
            raise InputError(f"{self.option} {self.path}: cannot be written: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all; names that are not Unicode get a "?"."""
    if path.exists() and not path.is_file():  # /dev/stderr, a pipe
        path.write_text(text, encoding="utf-8", errors="replace")
        return
    # In the same folder: only within one file system is a rename one step.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        # There is no way to read it without setting it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # as an ordinary new file; mkstemp's are private
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
