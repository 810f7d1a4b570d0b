"""Did a refactoring change any output? Every file that the package writes, for many designs, compared between versions.

    python -m tools.census.output_hashes --write before.json     # with the version that is right
    python -m tools.census.output_hashes --against before.json   # with the other; exit status 1 if anything differs

The embedded models and small random ones (see `tools.census.sources`) are converted by every method that applies,
through `normconvert.convert` alone, so older versions of the package can be asked too. The embedded ones are verified.
The code that is shipped in an output (`modeling_normconvert.py`) is reported, and is never a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import normconvert
from normconvert.errors import NormConvertError
from tools.census.normalised import (
    different_paths,
    folder_hashes,
    folder_record,
    normalised,
    same_figure,
)
from tools.census.sources import COLUMNS, Arguments, Checkpoint, checkpoints

Record = dict[str, Any]
SHOWN = 12
"""So many differences of one output are named."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if an output differs."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE.json", help="where to keep what this version writes")
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="what an earlier version wrote")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(checkpoints()), help="these checkpoints")
    arguments = parser.parse_args(argv)
    if arguments.write is None and arguments.against is None:
        parser.error("expected --write FILE.json or --against FILE.json, or both")
    before = json.loads(arguments.against.read_text()) if arguments.against else None
    started = time.monotonic()
    now = records(arguments.only or list(checkpoints()))
    print(f"normconvert of {Path(normconvert.__file__).parent}, {time.monotonic() - started:.0f} seconds")
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(now, indent=1) + "\n")
    if before is None:
        _show(
            {row: {m: _kind(new, "written") for m, new in one["methods"].items()} for row, one in now["rows"].items()}
        )
        return 0
    if arguments.only:
        before["rows"] = {row: one for row, one in before["rows"].items() if row in arguments.only}
    return compare(before, now)


def records(names: Sequence[str]) -> Record:
    """What this version writes for the checkpoints named: ``versions`` of the libraries, and ``rows``."""
    from importlib.metadata import version

    import torch

    torch.set_num_threads(1)
    rows = {}
    for name in names:
        # In a folder of its own, so that nothing one conversion leaves behind is found by the next.
        with tempfile.TemporaryDirectory(prefix="normconvert-") as folder:
            rows[name] = _row(checkpoints()[name], Path(folder).resolve())
    return {"versions": {library: version(library) for library in ("torch", "transformers", "timm")}, "rows": rows}


def _row(checkpoint: Checkpoint, folder: Path) -> Record:
    source = checkpoint.make(folder)
    hashes = {} if checkpoint.embedded else folder_hashes(Path(source))
    methods = {}
    for column, arguments in checkpoint.methods.items():
        out = folder / "converted"
        methods[column] = _outcome(source, out, arguments, str(folder), hashes, verify=checkpoint.embedded)
        shutil.rmtree(out, ignore_errors=True)
    return {"source": hashes, "methods": methods}


def _outcome(source: str, out: Path, arguments: Arguments, temporary: str, copied: Record, verify: bool) -> Record:
    """What one conversion wrote and returned, or why it was refused."""
    try:
        report = normconvert.convert(source, out, verify=verify, **arguments)
    except NormConvertError as error:
        return {"refused": f"{type(error).__name__}: {error}".replace(temporary, "")}
    record = folder_record(out, temporary, copied)
    # Plan and figures are in normconvert.json.
    returned = {key: value for key, value in report.to_json().items() if key not in ("plan", "fidelity")}
    record["contents"]["(report)"] = normalised(json.loads(json.dumps(returned)), temporary)[0]
    return record


def compare(before: Record, now: Record) -> int:
    """Print the table of what differs, then each difference; 1 if there is any, else 0."""
    found: dict[tuple[str, str], list[str]] = {}
    table: dict[str, dict[str, str]] = {}
    for row in dict.fromkeys([*before["rows"], *now["rows"]]):
        old, new = (side["rows"].get(row, {"source": {}, "methods": {}}) for side in (before, now))
        if row in before["rows"] and row in now["rows"] and old["source"] != new["source"]:
            found[row, "source"] = ["the checkpoint that is converted differs, so what follows says nothing"]
        for method in dict.fromkeys([*old["methods"], *new["methods"]]):
            then, this = old["methods"].get(method), new["methods"].get(method)
            differences = list(_differences(then, this))
            if differences:
                found[row, method] = differences
            table.setdefault(row, {})[method] = "differs" if differences else _kind(this)
    _show(table)
    for (row, method), differences in found.items():
        print(f"\n{row}, {method}:")
        print("\n".join(f"  {line}" for line in differences[:SHOWN]))
        if len(differences) > SHOWN:
            print(f"  and {len(differences) - SHOWN} more")
    if before["versions"] != now["versions"]:
        print(f"\nother libraries: {before['versions']}, now {now['versions']}")
    print(f"\nshipped code: {_shipped(before, now)}")
    count = sum(len(row) for row in table.values())
    print(f"{count - sum(method != 'source' for _, method in found)} of {count} outputs and refusals are the same")
    return int(bool(found))


def _differences(old: Record | None, new: Record | None) -> Iterator[str]:
    if old is None or new is None:
        yield "not converted " + ("before" if old is None else "now")
    elif "refused" in old or "refused" in new:
        if old.get("refused") != new.get("refused"):
            yield from (f"{when}: {side.get('refused', 'converted')}" for when, side in (("before", old), ("now", new)))
    else:
        for name in dict.fromkeys([*old["files"], *new["files"]]):
            yield from _file_differences(name, old, new)
        contents = (side["contents"]["(report)"] for side in (old, new))
        yield from (f"(report) {place}" for place in different_paths(*contents))
        for place in dict.fromkeys([*old["figures"], *new["figures"]]):
            before, now = old["figures"].get(place), new["figures"].get(place)
            if not same_figure(before, now):
                yield f"normconvert.json {place}: {before}, now {now}"


def _file_differences(name: str, old: Record, new: Record) -> Iterator[str]:
    before, now = old["files"].get(name), new["files"].get(name)
    if before == now:
        return
    if before is None or now is None:
        yield f"{name}: {'new' if before is None else 'gone'}"
    elif name in old["contents"] and name in new["contents"]:
        places = list(different_paths(old["contents"][name], new["contents"][name]))
        yield from (f"{name} {place}" for place in places)
        if not places:
            yield f"{name}: the same content, written otherwise"
    else:
        yield f"{name}: {before[:12]}, now {now[:12]}"


def _kind(outcome: Record | None, converted: str = "same") -> str:
    return "refused" if outcome is not None and "refused" in outcome else converted


def _shipped(before: Record, now: Record) -> str:
    """What became of the code that is shipped in outputs; every output has the same, or none."""
    sides = []
    for side in (before, now):
        outcomes = [outcome for row in side["rows"].values() for outcome in row["methods"].values()]
        sides.append({item for outcome in outcomes for item in outcome.get("shipped_code", {}).items()})
    if sides[0] == sides[1]:
        return "unchanged"
    old, new = (", ".join(f"{name} {digest[:12]}" for name, digest in sorted(side)) or "none" for side in sides)
    return f"changed: {old}; now {new}"


def _show(table: dict[str, dict[str, str]]) -> None:
    """Print a table of rows and methods; ``refused`` is for the same reason as before."""
    columns = [column for column in COLUMNS if any(column in row for row in table.values())]
    width = max((len(row) for row in table), default=0)
    print(" " * width, *columns, sep="  ")
    for row, cells in table.items():
        print(row.ljust(width), *(cells.get(column, "").ljust(len(column)) for column in columns), sep="  ")


if __name__ == "__main__":
    # Before torch and its kin are imported. With one thread, sums are taken in the same order each time.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.exit(main())
