"""Is every timm model identified? Writes docs/identify.md, with the sets that names and shapes cannot tell apart.

Every model of the installed timm is built with 7 classes and without a classifier. What `identify` says of its names
and shapes has to be the set of models whose names and shapes are equal, found here without the index. For some models
a file is written, a header and a hole, and the whole command is timed.

    nice python tools/identify_census.py            # about fifteen minutes; goes on where it stopped
    python tools/identify_census.py --only resnet50 # one or a few models, no page
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHUNK = 100
CLASSES = (7, 0)
TIMED = 50
"""Every so many models the command is timed."""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a model is not identified."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "identify.md")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / f"identify-{version('timm')}.jsonl")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return _child(arguments.only, arguments.work)
    listing = [sys.executable, "-c", "import timm; print(*timm.list_models())"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    wanted = arguments.only or names
    while todo := [name for name in wanted if name not in (done := _read(arguments.work))]:
        command = [sys.executable, str(Path(__file__)), "--child", "--work", str(arguments.work), "--only"]
        subprocess.run([*command, *todo[:CHUNK]], check=True)
        print(f"{len(done)}/{len(wanted)}  {time.monotonic() - started:.0f} s", flush=True)
    rows = [row for name, row in sorted(_read(arguments.work).items()) if name in set(names)]
    wrong = _wrong(rows, complete=len(rows) == len(names))
    for name, text in wrong.items():
        print(f"WRONG {name}: {text}")
    if not arguments.only:
        arguments.out.write_text(_page(rows, wrong, version("timm")))
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    print(f"{len(rows) - len(wrong)} of {len(rows)} identified; {_timing(seconds)}")
    return int(bool(wrong))


def _read(work: Path) -> dict[str, Row]:
    rows = (json.loads(line) for line in work.read_text().splitlines()) if work.exists() else ()
    return {row["name"]: row for row in rows}


def _child(names: list[str], work: Path) -> int:
    import logging
    import warnings

    from normconvert.identification import Names, identify_names
    from normconvert.identification.building import build, shapes

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for name in names:
        row: Row = {"name": name}
        for classes in CLASSES:
            model = build(name, num_classes=classes)
            every = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            integers = frozenset(n for n, t in model.state_dict().items() if not t.is_floating_point())
            found = identify_names(name, Names(every, integers), prove=False)
            digest = hashlib.sha256(repr(sorted(shapes(model).items())).encode()).hexdigest()
            row[str(classes)] = {
                "digest": digest, "found": [c.name for c in found.exact],
                "classes": [c.num_classes for c in found.exact],
            }  # fmt: skip
            if classes and int(digest, 16) % TIMED == 0:
                row["seconds"] = _seconds(every, integers)
        with work.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
    return 0


def _seconds(every: dict[str, tuple[int, ...]], integers: frozenset[str]) -> float:
    """What the command takes on a file of these tensors, from start to end."""
    from normconvert.sources.safetensors_file import read_header, write_header

    header = write_header([(n, "I64" if n in integers else "F32", s) for n, s in every.items()], {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(header)
        offsets = json.loads(header[8:])
        os.truncate(path, len(header) + max(entry["data_offsets"][1] for entry in offsets.values()))
        assert len(read_header(path).tensors) == len(every)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "normconvert", "identify", str(path)], check=True, capture_output=True)
        return time.perf_counter() - start


def _wrong(rows: list[Row], *, complete: bool) -> dict[str, str]:
    """Model -> what is wrong with what was found."""
    wrong = {}
    for classes in CLASSES:
        groups: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            groups[row[str(classes)]["digest"]].add(row["name"])
        for row in rows:
            found, equal = set(row[str(classes)]["found"]), groups[row[str(classes)]["digest"]]
            if not found >= equal or (complete and found != equal):
                wrong[row["name"]] = f"with {classes} classes found {sorted(found)}, equal are {sorted(equal)}"
    return wrong


def _timing(seconds: list[float]) -> str:
    if not seconds:
        return "none timed"
    return f"{statistics.median(seconds):.2f} s a file ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} files)"


def _page(rows: list[Row], wrong: dict[str, str], timm: str) -> str:
    sets = {tuple(sorted(row["7"]["found"])) for row in rows}
    shared = sorted(names for names in sets if len(names) > 1)
    alone = sum(len(names) == 1 for names in sets)
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    lines = [
        "# What identify can tell apart",
        "",
        "Written by `python tools/identify_census.py`. Every model of timm "
        f"{timm} was built with another number of classes and without a classifier, and identified by its names and "
        "shapes.",
        "",
        "| | models |",
        "| --- | --- |",
        "| identified, alone or as the exact set of models with the same names and shapes | "
        f"{len(rows) - len(wrong)} of {len(rows)} |",
        f"| alone | {alone} |",
        f"| in one of {len(shared)} sets | {sum(map(len, shared))} |",
        "",
        f"The whole command takes {_timing(seconds)}, while other programs kept the machine busy.",
        "",
        "## Sets that names and shapes cannot tell apart",
        "",
        "Members of a set may compute differently (padding, epsilon, activation, image normalisation). Which one it is "
        "has to be said by `--arch`, by metadata or by the file's name.",
        "",
        *(f"- {', '.join(names)}" for names in shared),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
