"""The program: ``python -m normconvert``, and what the command ``normconvert`` starts.

The first lines run before anything is imported that takes time, so that Ctrl-C then is no traceback either.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and end the process with its exit status."""
    _open_standard_streams()
    # `python -m` looks into the current folder first, where a checkpoint may bring a json.py along.
    sys.path[:] = [path for path in sys.path if not _is_foreign_current_folder(path)]
    from normconvert import interrupts

    interrupts.install()
    try:
        from normconvert.cli import main as run

        run()
    except KeyboardInterrupt as error:
        interrupts.ignore()
        print("interrupted; nothing was written", file=sys.stderr)
        os._exit(getattr(error, "exit_status", 130))


def _open_standard_streams() -> None:
    """A closed stream's number would be that of the next file opened: what is printed would go into the weights."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _is_foreign_current_folder(path: str) -> bool:
    here = os.path.realpath(os.getcwd())
    home = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return os.path.realpath(path or here) == here != home


if __name__ == "__main__":
    main()
