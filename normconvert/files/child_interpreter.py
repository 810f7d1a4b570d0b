"""Starting another Python that imports what this one does, and nothing that lies about in the current folder.

``python -c`` and ``python -m`` look into the current folder first: a ``json.py`` or ``numpy.py`` beside a checkpoint
would be run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# From 3.11 on without the current folder; before, the same and without PYTHON* variables and the user's packages, which
# the path that is handed over brings back.
_SAFE = "-P" if sys.version_info >= (3, 11) else "-I"


def child_interpreter(code: str, *arguments: str) -> list[str]:
    """The command that runs ``code`` in a Python with this one's import path.

    Args:
        code: what it does, after ``import sys``.
        arguments: its ``sys.argv[1:]``.
    """
    take_path = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    return [sys.executable, _SAFE, "-u", "-c", take_path + code, json.dumps(import_path()), *arguments]


def import_path() -> list[str]:
    """This interpreter's import path, without the current folder unless the package itself comes from there."""
    here, home = os.path.realpath(os.getcwd()), os.path.realpath(Path(__file__).parents[2])
    found = [os.path.abspath(path or os.getcwd()) for path in sys.path]
    return [path for path in found if os.path.realpath(path) != here or here == home]
