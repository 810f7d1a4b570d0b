"""Pages that several tools write together: each owns a section, which a comment line with its name begins.

A tool replaces its own section and leaves the others, and what stands before the first, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

MARK = re.compile(r"^<!-- ([\w.-]+) -->\n", re.MULTILINE)
"""The line that begins a section."""


def write_section(path: Path, name: str, text: str, order: Sequence[str]) -> None:
    """Write the section ``name`` of the page at ``path``; all else that is there stays.

    Args:
        path: the page; made, with its folder, if it is not there.
        name: the section: letters, digits, dots and dashes.
        text: Markdown.
        order: names of sections in the order of the page. Sections that it does not name come last, as they stand.

    Raises:
        ValueError: a line of ``text`` would begin a section of its own, or ``name`` is no name.
    """
    if not MARK.fullmatch(_begin(name)):
        raise ValueError(f"{name!r} is no name for a section")
    if MARK.search(text):
        raise ValueError(f"section {name!r} holds a line that begins a section")
    before, found = sections(path.read_text(encoding="utf-8") if path.exists() else "")
    found[name] = text.rstrip("\n") + "\n"
    names = [n for n in order if n in found] + [n for n in found if n not in order]
    parts = [before, *(_begin(n) + found[n] for n in names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def sections(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section of a page, and the sections by name, in their order."""
    before, *rest = MARK.split(text)
    named = zip(rest[::2], rest[1::2], strict=True)
    return before.strip("\n") + "\n" * bool(before.strip()), {name: own.rstrip("\n") + "\n" for name, own in named}


def _begin(name: str) -> str:
    return f"<!-- {name} -->\n"
