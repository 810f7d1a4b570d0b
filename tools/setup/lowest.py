"""``python tools/setup/lowest.py``: pyproject.toml's lowest versions, as constraints for pip and uv.

    python tools/setup/lowest.py > lowest.txt
    pip install -c lowest.txt -e .

`make test-lowest` does that. Every dependency is held to its lower bound, and two that cannot go together end the
installation. (``uv pip install --resolution lowest-direct`` would take a higher version of one then, and its bound
would not have been tried.)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PROJECT = re.compile(r"^\[project\]$.*?^\[tool\.|^\[project\.scripts\]", re.MULTILINE | re.DOTALL)
REQUIREMENT = re.compile(r'"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=([0-9.]+)"')


def lowest(text: str) -> dict[str, str]:
    """Package -> the lowest version that a pyproject.toml states; of its extras, too.

    Read by a pattern, since Python 3.10 has nothing for TOML.

    Raises:
        ValueError: two bounds of one package.
    """
    found: dict[str, str] = {}
    section = PROJECT.search(text)
    for name, version in REQUIREMENT.findall(section.group() if section else ""):
        if found.setdefault(name.lower(), version) != version:
            raise ValueError(f"{name}: two lower bounds, {found[name.lower()]} and {version}")
    return found


SAME_FILES = {"typer-slim": "typer"}
"""Packages that other dependencies bring, and that install the files of one of ours."""

if __name__ == "__main__":
    bounds = lowest(PYPROJECT.read_text("utf-8"))
    bounds |= {name: bounds[ours] for name, ours in SAME_FILES.items()}
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in bounds.items())
