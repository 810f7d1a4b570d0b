"""The sections of docs/performance.md and docs/swap.md that a file of rows, or none, gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normconvert.benchmark.result import ORIGINAL
from normconvert.report.benchmark import machine_in_words
from tools.benchmarks.fuse import SECTIONS
from tools.benchmarks.gpu import conversion, swapped
from tools.benchmarks.gpu.groups import GROUPS
from tools.benchmarks.gpu.rows import OK, Row
from tools.docs.pages import write_section

SECTION = "gpu"
COMMAND = "python -m tools.benchmarks.gpu --minutes 8 --write"
LEGEND = (
    "*original* is the time of a call, median with quartiles; the other columns are how much faster than the original "
    "a version is (median of the rounds, ± half of what lies between the quartiles)."
)
HOW = (
    f"`{COMMAND}` measures all of this on any machine with a CUDA GPU, in eight minutes and without downloading "
    "anything; `--plan` shows the rows, and `--merge FILE` writes these pages from a file that was measured elsewhere."
)


def write_pages(docs: Path, document: Mapping[str, Any] | None) -> None:
    """Write both sections.

    Args:
        docs: the folder of the pages.
        document: what a run wrote; None: nothing has been measured.
    """
    own = [group for group in GROUPS if group != swapped.NAME]
    write_section(docs / "performance.md", SECTION, section("On a GPU", own, document), [*SECTIONS, "batches"])
    write_section(docs / "swap.md", SECTION, section("On a GPU", [swapped.NAME], document), [])


def section(title: str, groups: Sequence[str], document: Mapping[str, Any] | None) -> str:
    """Markdown: the groups' tables, with the machine, the versions and the command."""
    lines = [f"## {title}", "", HOW, ""]
    if document is None:
        titles = "; ".join(GROUPS[name].title for name in groups)
        return "\n".join([*lines, f"{titles}: not measured, since no GPU was at hand.", ""])
    lines += [f"{about_in_words(document)}. {LEGEND}", ""]
    rows = [Row.from_json(row) for row in document["rows"]]
    for name in groups:
        own = [row for row in rows if row.group == name]
        lines += [f"### {GROUPS[name].title}, on a GPU", "", *table(name, own), ""]
    return "\n".join(lines)


def about_in_words(document: Mapping[str, Any]) -> str:
    """Machine, versions, commands."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    commands = " and ".join(f"`{command}`" for command in document["commands"])
    small = "; toys, no figures worth keeping" if document["small"] else ""
    return f"{machine_in_words(document['machine'])}, {versions}; made by {commands}{small}"


def table(group: str, rows: Sequence[Row]) -> Iterator[str]:
    """One table for a group; without rows a line that says so."""
    if not rows:
        yield "Not measured."
        return
    base = conversion.CPU if group == conversion.NAME else ORIGINAL
    seen: list[Iterable[str]] = [names for row in rows for names in (row.milliseconds, row.failures, row.figures)]
    versions = [name for name in dict.fromkeys(v for names in seen for v in names) if name != base and "," not in name]
    memory = any(size is not None for row in rows for size in row.peak_bytes.values())
    head = ["", f"{base}, ms", *versions, *["peak memory"] * memory]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] * len(head))} |"
    for row in rows:
        cells = [_base(row, base), *(_cell(row, name) for name in versions)]
        if memory:
            cells.append(_memory(row))
        yield f"| {row.name} | {' | '.join(cells)} |"


def _base(row: Row, base: str) -> str:
    """The original's time, or why there is none."""
    if row.status != OK:
        return f"{row.status}: {row.reason}".replace("|", "\\|")
    own = row.milliseconds.get(base)
    if own is None:
        return "–" if row.milliseconds else "✓"
    return f"{own.median:.4g} ({own.low:.4g} to {own.high:.4g})" if own.low != own.high else f"{own.median:.4g}"


def _cell(row: Row, version: str) -> str:
    """How a version fares beside the original."""
    speed = row.speedup.get(version)
    if speed is not None:
        return f"{speed.median:.3f} × ±{(speed.high - speed.low) / 2:.3f}"
    if version in row.milliseconds:
        return f"{row.milliseconds[version].median:.4g} ms"
    if version in row.figures:
        return f"{row.figures[version]:.1e} off"
    return "not measured" if version in row.failures else "–"


def _memory(row: Row) -> str:
    """Peak of each version; of all but the original as a part of the original's."""
    known = {name: size for name, size in row.peak_bytes.items() if size}
    base = known.get(ORIGINAL)
    parts = [f"{known[ORIGINAL] / 1e6:.1f} MB"] if base else []
    for name, size in known.items():
        if name != ORIGINAL:
            parts.append(f"{name} {size / base:.3f} ×" if base else f"{name} {size / 1e6:.1f} MB")
    return ", ".join(parts)
