"""The table of a benchmark, and its JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normconvert.benchmark.result import BOUND, CONVERTED, ORIGINAL, WORTH, Benchmark, Row
from normconvert.errors import InputError
from normconvert.report.console import BAD, FAINT, GOOD, HEAD, indented, two_columns
from normconvert.wording.words import human_bytes

if TYPE_CHECKING:
    from normconvert.benchmark.timing import Spread

LEGEND = (
    "× is the original's time over its own, ± half of what lies between the quartiles. The bound is the original "
    "without these norms; how much of the way to it the conversion goes is said where it is above 1.03 "
    "and the quartiles agree on it."
)

SLOWER = 0.99
"""A median ratio below this is shown as slower."""


def benchmark_document(result: Benchmark) -> dict[str, Any]:
    """For ``--json``."""
    return {"command": "bench", **result.to_json()}


def read_benchmark(file: Path) -> dict[str, Any]:
    """The JSON document that ``normconvert bench --json`` wrote.

    Raises:
        InputError: it is something else.
    """
    from normconvert.files.weight_files import load_json

    data = load_json(file)
    try:
        # Only to see that nothing is missing before the page is made of it.
        Benchmark(**{f.name: data[f.name] for f in fields(Benchmark)})
        rows = [Row.from_json(row).name for row in data["rows"]]
        if not rows or data["command"] != "bench":
            raise ValueError("no rows")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not the JSON of `normconvert bench` ({error!r})") from error
    return data


def show_benchmark(console: Console, result: Benchmark, *, verbose: bool = False) -> None:
    """The rows, each with the original's time and what the others are faster by."""
    title = Text.assemble((result.source, HEAD))
    if result.converted is not None:
        title.append(" → ").append(result.converted, HEAD)
    console.print(title, soft_wrap=True)
    grid = two_columns()
    grid.add_row("architecture", f"{result.architecture} ({result.library}, run in {result.dtype})")
    grid.add_row("norms", f"{result.norms['converted']} of {result.norms['total']} ({result.method})")
    grid.add_row("machine", machine_in_words(result.machine))
    grid.add_row("parameters", _memory(result.parameter_bytes))
    if peaks := largest_peaks(result.rows):
        grid.add_row("at the peak", f"{_memory(peaks)} more")
    console.print(Padding(grid, (0, 0, 1, 2)))
    console.print(Padding(_table(result, verbose), (0, 0, 1, 2)))
    for row in result.rows:
        for version, reason in row.failures.items():
            console.print(indented(Text(f"{row.name}: {version} not measured: {reason}", "yellow")))
    console.print(indented(Text(LEGEND, FAINT)))


def machine_in_words(found: dict[str, Any]) -> str:
    """``NVIDIA H100, torch 2.15`` or ``AMD EPYC, 2 threads, torch 2.15``."""
    threads = found["threads"]
    cpu = f"{found['processor']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{found.get('gpu', cpu)}, torch {found['torch']}"


def largest_peaks(rows: Sequence[Row]) -> dict[str, int]:
    """Version -> the most memory that a call of any row takes beyond the parameters."""
    found: dict[str, int] = {}
    for row in rows:
        for version, peak in row.peak_bytes.items():
            if peak is not None:
                found[version] = max(peak, found.get(version, 0))
    return found


def milliseconds(value: float) -> str:
    """Three digits: ``12.3 ms``."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def times(ratio: Spread) -> str:
    """``1.012× ±0.004``: median, and half of what lies between the quartiles."""
    return f"{ratio.median:.3f}× ±{(ratio.high - ratio.low) / 2:.3f}"


def _memory(versions: dict[str, int]) -> str:
    words = human_bytes(versions[ORIGINAL])
    if CONVERTED in versions:
        words += f", converted {human_bytes(versions[CONVERTED])}"
    return words


def _table(result: Benchmark, verbose: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    has_converted = result.converted is not None
    headings = ["", ORIGINAL, *[CONVERTED] * has_converted, BOUND, *["of it"] * has_converted]
    headings += ["rounds × calls", "peak"] if verbose else []
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in result.rows:
        cells: list[str | Text] = [row.name]
        if ORIGINAL not in row.milliseconds:
            table.add_row(row.name, Text("not measured", "yellow"))
            continue
        cells.append(milliseconds(row.milliseconds[ORIGINAL].median))
        if has_converted:
            cells.append(_ratio(row, CONVERTED))
        cells.append(_ratio(row, BOUND))
        if has_converted:
            cells.append("" if row.share is None else f"{row.share:.0%}".replace("%", " %"))
        if verbose:
            peak = row.peak_bytes.get(ORIGINAL)
            cells += [f"{row.rounds} × {row.calls}", "" if peak is None else human_bytes(peak)]
        table.add_row(*cells)
    return table


def _ratio(row: Row, version: str) -> Text:
    ratio = row.speedup.get(version)
    if ratio is None:
        return Text("not measured", "yellow")
    style = ""
    if version == CONVERTED:
        # A colour needs more than a median: the quartiles have to agree, since times scatter.
        style = BAD if ratio.median < SLOWER and ratio.high < 1 else GOOD if ratio.low > 1 else ""
    return Text(times(ratio), style)


__all__ = ["WORTH", "benchmark_document", "machine_in_words", "milliseconds", "show_benchmark", "times"]
