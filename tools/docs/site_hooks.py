"""What mkdocs needs to know about the pages of ``docs/``: called by it, named in ``mkdocs.yml``.

Pages that tools write (``tools/benchmarks/*.py``, ``tools/demos/swap_demos.py``, ...) are there once the tool has run.
They join the part of the navigation called *Measured* by themselves, so that no page is left out of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MEASURED = "Measured"


def on_config(config: Any) -> Any:
    """Put every page that the navigation does not name under *Measured*."""
    docs = Path(config["docs_dir"])
    named = set(_pages(config["nav"]))
    others = sorted(path.name for path in docs.glob("*.md") if path.name not in named)
    section = next(entry[MEASURED] for entry in config["nav"] if MEASURED in entry)
    section += [{title(docs / name): name} for name in others]
    return config


def _pages(nav: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for entry in nav:
        for value in entry.values():
            found += _pages(value) if isinstance(value, list) else [value]
    return found


def title(page: Path) -> str:
    """The first heading of a page; its name without one."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return next((line[2:].strip() for line in lines if line.startswith("# ")), page.stem)
