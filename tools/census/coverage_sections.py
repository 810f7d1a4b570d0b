"""The sections of the coverage page, one a conversion, and what they say in the terminal and as an exit status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tools.census.coverage_fuse_page import fuse_counts, fuse_section, is_incomplete
from tools.census.coverage_page import Row, by_library, counts, page
from tools.docs.pages import write_section


def summary(rows: list[Row], method: str = "rmsnorm") -> str:
    """A few lines for the terminal."""
    figures, _ = _sections()[method]
    parts = by_library(rows)
    return "\n".join(
        f"{lib}: " + ", ".join(f"{v} {k}" for k, v in figures(part).items()) for lib, part in parts.items()
    )


def write_page(path: Path, method: str, rows: list[Row], versions: dict[str, str], left: int = 0) -> None:
    """Write the section of ``method`` into the page at ``path``; other sections stay."""
    found = _sections()
    write_section(path, method, found[method][1](rows, versions, left), list(found))


def _sections() -> Mapping[str, tuple[Callable[[list[Row]], dict[str, int]], Callable[..., str]]]:
    """Method -> its figures and its section, in the order of the page."""
    return {"rmsnorm": (counts, page), "fuse-bn": (fuse_counts, fuse_section)}


def is_wrong(row: Row, method: str) -> bool:
    """Whether a row shows a fault of ours, for the exit status."""
    wrong = row.get("mismatch") or row.get("again", {}).get("mismatch")
    return bool(wrong) or (method == "fuse-bn" and is_incomplete(row))
