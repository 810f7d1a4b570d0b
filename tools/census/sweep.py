"""A sweep over models, one row each: what is done is kept, so that one which was stopped goes on where it was."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.census.one_model import first_line

Key = tuple[str, str]
"""Library, and name of a model."""
Row = dict[str, Any]


def options(about: str, work: Path, written: str = "section") -> argparse.ArgumentParser:
    """The options that every sweep has.

    Args:
        about: the docstring of the census.
        work: where its rows are kept.
        written: what of a page it writes.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types or timm model names")
    parser.add_argument("--minutes", type=float, default=60, help="begin no model after these (default: 60)")
    parser.add_argument("--work", type=Path, default=work, help="results so far")
    parser.add_argument("--write", action="store_true", help=f"sweep nothing; write the page's {written}")
    return parser


def read_rows(path: Path) -> dict[Key, Row]:
    """The rows of the work file; a later row of a model replaces an earlier one, and a torn last line is dropped."""
    rows: dict[Key, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["library"], row["name"]] = row
    return rows


def sweep(
    arguments: argparse.Namespace,
    keys: Iterable[Key],
    rows: dict[Key, Row],
    row_of: Callable[[str, str], Row],
    told: Callable[[Row], object],
) -> None:
    """Make the rows of the models that have none yet, until the time is over.

    Args:
        arguments: of :func:`options`.
        keys: the models, in order.
        rows: what is known; gains what is found.
        row_of: makes the row of a model; whatever it raises, the others are still to be looked at.
        told: what is printed of a row.
    """
    end = time.monotonic() + 60 * arguments.minutes
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    with arguments.work.open("a") as work:
        for library, name in keys:
            if (library, name) in rows:
                continue
            if time.monotonic() > end:
                break
            try:
                found = row_of(library, name)
            except Exception as error:
                found = {"failure": first_line(error)}
            rows[library, name] = row = {"library": library, "name": name, **found}
            work.write(json.dumps(row) + "\n")
            work.flush()
            print(f"{library} {name}: {told(row)}", flush=True)
