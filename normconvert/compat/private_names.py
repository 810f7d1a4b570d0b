"""A private name of a library, and the error for one that a release lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from normconvert.errors import UnsupportedVersion

REFUSED = "refused, naming the version"


@dataclass(frozen=True)
class PrivateName:
    """Something that a library does not promise to keep.

    Attributes:
        path: where it is, ``torch.fx.config.do_not_emit_stack_traces``.
        use: what for.
        seen: releases that were looked at and have it.
        without: what happens where a release lacks it.
    """

    path: str
    use: str
    seen: str
    without: str = REFUSED

    @property
    def library(self) -> str:
        """The package that it belongs to."""
        return self.path.partition(".")[0]


def rows(names: tuple[PrivateName, ...]) -> Iterator[str]:
    """The lines of the table in docs/design.md."""
    yield "| name | used for | seen in | without it |"
    yield "| --- | --- | --- | --- |"
    for name in names:
        yield f"| `{name.path}` | {name.use} | {name.seen} | {name.without} |"


def gone(names: tuple[PrivateName, ...], what: str) -> UnsupportedVersion:
    """The error for a name of the table that is missing, or that does not take what it took; ``what`` says it."""
    library = names[0].library
    told = [name for name in names if name.path.rpartition(".")[2] in what] or names
    seen = dict.fromkeys(release for name in told for release in name.seen.split(", "))
    try:
        installed = version(library)
    except PackageNotFoundError:
        installed = "of unknown version"
    return UnsupportedVersion(
        f"{library} {installed} is not what normconvert was written for ({what}); it is known to work with {library} "
        f"{', '.join(seen)}"
    )


@contextmanager
def needed(names: tuple[PrivateName, ...]) -> Iterator[None]:
    """Imports of these names within are refused with their versions where one is missing.

    Raises:
        UnsupportedVersion: an import failed.
    """
    try:
        yield
    except ImportError as error:
        raise gone(names, str(error)) from error


def attribute(holder: Any, name: str, names: tuple[PrivateName, ...]) -> Any:
    """``holder.name``.

    Raises:
        UnsupportedVersion: there is none.
    """
    try:
        return getattr(holder, name)
    except AttributeError as error:
        raise gone(names, str(error)) from error
