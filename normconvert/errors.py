"""Errors a user can act on. Each carries the exit status that the command line ends with."""

from __future__ import annotations


class NormConvertError(Exception):
    """Base of every error raised on purpose: one clear line saying what was expected, found, and what to do."""

    exit_status = 2


class InputError(NormConvertError):
    """The input or the usage is at fault (exit status 2): a missing path, a corrupt file, an unknown option value."""

    exit_status = 2


class Unfinished(InputError):
    """Something outside is in the way, such as the network or a full disk: the same again may succeed later."""


class UnsupportedVersion(NormConvertError):
    """A library has another form than the releases that this package was written for (exit status 2)."""

    exit_status = 2


class FidelityError(NormConvertError):
    """The converted checkpoint does not compute what the original computes (exit status 1)."""

    exit_status = 1


class NothingToConvert(NormConvertError):
    """No norm (or, with ``require_all``, not every norm) could be converted (exit status 3)."""

    exit_status = 3


class TraceError(NormConvertError):
    """The model could not be traced, so nothing can be proved about it (exit status 3)."""

    exit_status = 3


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does, with nothing half-way left."""

    exit_status = 143


class HungUp(Terminated):
    """SIGHUP: the terminal is gone."""

    exit_status = 129


def in_one_line(error: BaseException) -> str:
    """The kind of an error that somebody else raised, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"[:200]


def as_bug(error: BaseException, hint: str = "") -> str:
    """The one line that is said of an error which nobody foresaw."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first} (a bug in normconvert: please report it{hint})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type: for messages of one line; with the next, if that says what."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first
