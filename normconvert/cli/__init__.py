"""The command line: parse, call the Python API, print. Nothing heavy is imported before a command runs.

One file a command; importing it registers the command with the application, in the order ``--help`` shows them.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from normconvert import interrupts
from normconvert.cli import (  # noqa: F401
    adapter,
    bench,
    check,
    convert,
    demo,
    export,
    identify,
    inspect,
    run_recipes,
    schema,
    swap,
    verify,
)
from normconvert.cli.app import ARGUMENTS, app
from normconvert.errors import InputError
from normconvert.options import METHODS
from normconvert.report.screen import give_up_printing
from normconvert.tracing.garbage import collecting

__all__ = ["app", "main", "run"]


def run(arguments: Sequence[str]) -> int:
    """The exit status of ``normconvert *arguments``."""
    ARGUMENTS.set(tuple(arguments))
    try:
        status: Any = app(list(arguments), prog_name="normconvert", standalone_mode=False)
    except Exception as error:
        # typer brings a click of its own, or uses the one installed: a usage error is known by what it can do.
        if not hasattr(error, "format_message"):
            raise
        return _usage_error(error, arguments)
    except KeyboardInterrupt as error:
        return _interrupted(error)
    # Before a command begins it is typer that catches it.
    interruption = interrupts.take()
    if interruption is not None:
        return _interrupted(interruption)
    return status if isinstance(status, int) else 0


def _interrupted(error: KeyboardInterrupt) -> int:
    print("interrupted; nothing was written", file=sys.stderr)
    return getattr(error, "exit_status", 130)


def _usage_error(error: Any, arguments: Sequence[str]) -> int:
    from normconvert.report.document import error_document
    from normconvert.report.screen import Screen

    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "normconvert"
    message = (
        f"{' '.join(error.format_message().replace('Value error, ', '').split()).rstrip('.')}; see {command} --help"
    )
    screen = Screen(json_file=_json_argument(arguments), arguments=arguments)
    screen.error(message)
    try:
        screen.document(error_document(message, 2))
    except InputError as another:
        screen.error(str(another))
    return 2


def _json_argument(arguments: Sequence[str]) -> str | None:
    """The value of --json in arguments that could not be parsed."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--json="):
            return argument.removeprefix("--json=")
        if argument == "--json" and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def main() -> None:
    """Run the command line and end the process with the exit status."""
    interrupts.install()
    converting = bool(sys.argv[1:]) and sys.argv[1] in METHODS
    with collecting(not converting):  # they switch it on where it is of use
        status = run(sys.argv[1:])
        interrupts.ignore()
        give_up_printing()
        gc.freeze()  # else Python looks through all objects once more before it ends: more than a second
    if converting:
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> None:
    """End the process without taking its modules apart, which takes a quarter of a second with torch."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        return
    atexit._run_exitfuncs()
    os._exit(status)
