"""Write the index of timm's models that `normconvert identify` searches, for the timm that is installed.

Every model is built twice on the meta device, with and without a classifier. A process of its own for each hundred
models keeps memory flat; what is done is kept in ``build/``, so that an interrupted run goes on where it stopped.

    nice python tools/indexes/build_timm_index.py                # about ten minutes
    python tools/indexes/build_timm_index.py --only resnet50     # print one model's lines, write nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHUNK = 100


def main(argv: list[str] | None = None) -> int:
    """Build what the work file lacks, then write the index."""
    from importlib.metadata import version

    from normconvert.identification.prints import INDEX, Index, save_index

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--out", type=Path, default=INDEX)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / f"timm-prints-{version('timm')}.jsonl")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return _child(arguments.only, arguments.work)
    if arguments.only:
        return _show(arguments.only)
    names = _names()
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    while todo := sorted(set(names).difference(done := _read(arguments.work))):
        chunk = todo[:CHUNK]
        command = [sys.executable, str(Path(__file__)), "--child", "--work", str(arguments.work), "--only", *chunk]
        subprocess.run(command, check=True)
        print(f"{len(done) + len(chunk)}/{len(names)}  {time.monotonic() - started:.0f} s", flush=True)
    models = {name: text for name, text in _read(arguments.work).items() if name in set(names)}
    save_index(Index(version("timm"), models), arguments.out)
    print(f"{arguments.out}: {len(models)} models, {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


def _names() -> list[str]:
    code = "import timm; print(*timm.list_models())"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def _read(work: Path) -> dict[str, str]:
    rows = (json.loads(line) for line in work.read_text().splitlines()) if work.exists() else ()
    return {row["name"]: row["lines"] for row in rows}


def _child(names: list[str], work: Path) -> int:
    import logging
    import warnings

    from normconvert.identification.building import timm_print
    from normconvert.identification.prints import write_print

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for name in names:
        row = {"name": name, "lines": write_print(timm_print(name))}
        with work.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
    return 0


def _show(names: list[str]) -> int:
    from normconvert.identification.building import timm_print
    from normconvert.identification.prints import write_print

    for name in names:
        print(f"={name}\n{write_print(timm_print(name))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
