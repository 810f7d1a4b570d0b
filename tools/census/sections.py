"""A census's section of a page: written anew, with what stands before and behind it left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_under(page: Path, heading: str, lines: Sequence[str]) -> None:
    """Put ``lines``, the first being ``heading``, in the place of the section of that heading; else at the end."""
    head, _, tail = page.read_text(encoding="utf-8").partition(f"{heading}\n")
    rest = tail.find("\n## ")
    kept = tail[rest + 1 :] if rest >= 0 else ""
    page.write_text("\n".join([head.rstrip(), "", *lines, kept]).rstrip() + "\n", encoding="utf-8")
