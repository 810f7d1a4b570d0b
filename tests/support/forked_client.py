"""The command line in processes forked from one that has imported everything: a run takes a second, and can be killed.

Imported by multiprocessing's fork server (``set_forkserver_preload``), which is started with the settings of
huggingface_hub in its environment: they are read once, when it is imported.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

if __name__ == "tests.support.forked_client" and "NORMCONVERT_TEST_WARM" in os.environ:
    from normconvert.cli import run

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(["rmsnorm", "demo:gpt2", "nowhere", "--dry-run"])


def main(arguments: list[str], output: Path) -> None:
    """Be ``normconvert *arguments``, with stdout and stderr in the files ``output.out`` and ``output.err``."""
    for suffix, number in ((".out", 1), (".err", 2)):
        handle = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["normconvert", *arguments]
    from normconvert.cli import main as cli

    try:
        cli()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
