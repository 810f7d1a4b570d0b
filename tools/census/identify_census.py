"""Is every timm model identified? Writes docs/identify.md, with the sets that names and shapes cannot tell apart.

Every model of the installed timm is built with 7 classes and without a classifier. What `identify` says of its names
and shapes has to be the set of models whose names and shapes are equal, found here without the index. For some models,
the largest among them, a file is written, a header and a hole, and the whole command is timed.

    nice python tools/census/identify_census.py            # about fifteen minutes; goes on where it stopped
    python tools/census/identify_census.py --only resnet50 # one or a few models, no page
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHUNK = 400
CLASSES = (7, 0)
TIMED = 50
"""Every so many models the command is timed."""
LARGEST = 3
"""And those with so many of the longest fingerprints."""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a model is not identified."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "identify.md")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / f"identify-{version('timm')}.jsonl")
    parser.add_argument("--child", choices=("identify", "time"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        (_identify if arguments.child == "identify" else _time)(arguments.only, arguments.work)
        return 0
    listing = [sys.executable, "-c", "import timm; print(*timm.list_models())"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    wanted = arguments.only or names
    command = [sys.executable, str(Path(__file__)), "--work", str(arguments.work), "--child"]
    done = _read(arguments.work)
    while todo := [name for name in wanted if name not in done]:
        print(f"{len(done)}/{len(wanted)}  {time.monotonic() - started:.0f} s", flush=True)
        subprocess.run([*command, "identify", "--only", *todo[:CHUNK]], check=True)
        done = _read(arguments.work)
    if untimed := [name for name in _timed(done) if name in wanted and "processor" not in done[name]]:
        subprocess.run([*command, "time", "--only", *untimed], check=True)
    rows = [row for name, row in sorted(_read(arguments.work).items()) if name in set(names)]
    wrong = _wrong(rows, complete=len(rows) == len(names))
    for name, text in wrong.items():
        print(f"WRONG {name}: {text}")
    if not arguments.only:
        arguments.out.write_text(_page(rows, wrong, version("timm")))
    print(f"{len(rows) - len(wrong)} of {len(rows)} identified; {_timing(rows)}")
    return int(bool(wrong))


def _timed(done: dict[str, Row]) -> list[str]:
    """The models whose identification is timed."""
    from normconvert.identification.prints import load_index

    models = load_index().models
    largest = sorted(models, key=lambda name: models[name].count("\n"))[-LARGEST:]
    return [n for n, row in done.items() if n in largest or int(row[str(CLASSES[0])]["digest"], 16) % TIMED == 0]


def _read(work: Path) -> dict[str, Row]:
    rows = (json.loads(line) for line in work.read_text().splitlines()) if work.exists() else ()
    return {row["name"]: row for row in rows}


def _identify(names: list[str], work: Path) -> None:
    import logging
    import warnings

    from normconvert.identification import Names, identify_names
    from normconvert.identification.building import build, shapes

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for name in names:
        row: Row = {"name": name}
        model = None
        for classes in CLASSES:
            if classes or model is None or not _reset(model, name):
                model = build(name, num_classes=classes)
            every = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            integers = frozenset(n for n, t in model.state_dict().items() if not t.is_floating_point())
            found = identify_names(name, Names(every, integers), prove=False)
            digest = hashlib.sha256(repr(sorted(shapes(model).items())).encode()).hexdigest()
            row[str(classes)] = {
                "digest": digest, "found": [c.name for c in found.exact],
                "classes": [c.num_classes for c in found.exact],
            }  # fmt: skip
        _write(work, row)


def _write(work: Path, row: Row) -> None:
    with work.open("a") as handle:
        handle.write(json.dumps(row) + "\n")


def _time(names: list[str], work: Path) -> None:
    from normconvert.identification.building import build

    done = _read(work)
    for name in names:
        state = build(name, num_classes=CLASSES[0]).state_dict()
        integers = frozenset(n for n, t in state.items() if not t.is_floating_point())
        processor, wall = _seconds({n: tuple(t.shape) for n, t in state.items()}, integers)
        _write(work, {**done[name], "processor": processor, "wall": wall, "tensors": len(state)})


def _reset(model: Any, name: str) -> bool:
    """Take the classifier off, which is quicker than building the model again; whether that gives the same tensors."""
    from normconvert.identification.building import shapes
    from normconvert.identification.prints import load_index, read_print

    try:
        model.reset_classifier(0)
    except Exception:  # some models cannot
        return False
    lines = load_index().models.get(name)
    return lines is not None and shapes(model) == read_print(name, lines).core


def _seconds(every: dict[str, tuple[int, ...]], integers: frozenset[str]) -> tuple[float, float]:
    """What the command takes on a file of these tensors, from start to end: processor seconds, and by the clock."""
    from normconvert.files.safetensors_file import read_header, write_header

    header = write_header([(n, "I64" if n in integers else "F32", s) for n, s in every.items()], {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(header)
        offsets = json.loads(header[8:])
        os.truncate(path, len(header) + max(entry["data_offsets"][1] for entry in offsets.values()))
        assert len(read_header(path).tensors) == len(every)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "normconvert", "identify", str(path)], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return processor, time.perf_counter() - start


def _wrong(rows: list[Row], *, complete: bool) -> dict[str, str]:
    """Model -> what is wrong with what was found."""
    # A model without a classifier equals another that has taken its own off, whatever number of classes was asked for.
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for classes in CLASSES:
            groups[row[str(classes)]["digest"]].add(row["name"])
    wrong = {}
    for classes in CLASSES:
        for row in rows:
            found, equal = set(row[str(classes)]["found"]), groups[row[str(classes)]["digest"]]
            if not found >= equal or (complete and found != equal):
                wrong[row["name"]] = f"with {classes} classes found {sorted(found)}, equal are {sorted(equal)}"
    return wrong


def _timing(rows: list[Row]) -> str:
    """Medians and the worst, of processor time, which other programs do not lengthen, and by the clock."""
    timed = [row for row in rows if "processor" in row]
    if not timed:
        return "none timed"
    processor, wall = ([row[key] for row in timed] for key in ("processor", "wall"))
    slowest = max(timed, key=lambda row: row["processor"])
    return (
        f"{statistics.median(processor):.2f} s of one core for a file (median of {len(timed)}; at most "
        f"{max(processor):.2f} s, for {slowest['name']} with {slowest['tensors']} tensors); by the clock "
        f"{statistics.median(wall):.2f} s, at most {max(wall):.2f} s"
    )


def _page(rows: list[Row], wrong: dict[str, str], timm: str) -> str:
    from normconvert.identification.model_types import load_types

    sets = {tuple(sorted(row["7"]["found"])) for row in rows}
    shared = sorted((names for names in sets if len(names) > 1), key=lambda names: (-len(names), names))
    alone = sum(len(names) == 1 for names in sets)
    types = load_types()
    no_class = sum("no model class" in why for why in types.left_out.values())
    again = sum("another name" in why for why in types.left_out.values())
    classes = sum(len(row["classes"]) for row in types.rows)
    lines = [
        "# What identify can tell apart",
        "",
        "Written by `python tools/census/identify_census.py`. Every model of timm "
        f"{timm} was built with another number of classes and without a classifier, and identified by its names and "
        "shapes. What is right is the set of all models with the same names and shapes, found without the index.",
        "",
        "| | models |",
        "| --- | --- |",
        f"| right | {len(rows) - len(wrong)} of {len(rows)} |",
        f"| a single model | {alone} |",
        f"| one of {len(shared)} sets that names and shapes cannot tell apart | {sum(map(len, shared))} |",
        "",
        f"The whole command takes {_timing(rows)}. Other programs kept the machine busy meanwhile.",
        "",
        f"Of transformers {types.transformers} the index holds {len(types.rows)} model types with {classes} classes; "
        f"{len(types.left_out) - no_class - again} with a class of their own are left out, "
        f"{no_class} are parts of others, and {again} are other names of one that it holds.",
        "",
        "## Sets that names and shapes cannot tell apart",
        "",
        "Members of a set may compute differently (padding, epsilon, activation, image normalisation). Which one it is "
        "has to be said by `--arch`, by metadata or by the file's name.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {len(names)} | {_short(names)} |" for names in shared),
    ]
    return "\n".join(lines) + "\n"


def _short(names: tuple[str, ...]) -> str:
    """Names, with what all of them begin with written once: ``vit_base_patch16_`` + ``224``, ``rope_224``."""
    words = [name.split("_") for name in names]
    same = 0
    while all(len(parts) > same + 1 and parts[same] == words[0][same] for parts in words):
        same += 1
    start = "_".join(words[0][:same]) + "_"
    if len(start) < 8 or len(names) < 3:
        return ", ".join(f"`{name}`" for name in names)
    return f"`{start}` + {', '.join(f'`{name[len(start) :]}`' for name in names)}"


if __name__ == "__main__":
    sys.exit(main())
