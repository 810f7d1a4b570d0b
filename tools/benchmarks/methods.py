"""What each change of basis costs beside ``rmsnorm``: whole conversions of one checkpoint, side by side.

    python -m tools.benchmarks.methods [--repeats 3] [--write]

Makes a checkpoint in the shape of GPT-NeoX with 1.0B parameters in float32 and random weights in a temporary folder,
and converts it by every method in turn, verified as by default and not at all, as processes of their own. ``--write``
writes the section of docs/performance.md; for figures the machine must be idle. About 15 minutes, 10 GB of disk, 20 GB
of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from tools.benchmarks.convert import Run, measure
from tools.benchmarks.models import SECTIONS
from tools.benchmarks.verified import DOCS, SHAPES
from tools.docs.pages import write_section

METHODS = {"rmsnorm": ["rmsnorm"], "fold": ["fold"], "scale": ["scale", "--power", "2"], "rotate": ["rotate"]}
"""Row -> the command; a power that is said is not measured on probes."""
WAYS = {"verified": [], "not verified": ["--no-verify"]}
"""Column -> options; verified is what a command does by itself."""
ALLOWED = 1.5
"""What a method may take, as a multiple of rmsnorm's time."""

Runs = dict[tuple[str, str], list[Run]]
"""(way, method) -> its runs."""


def runs(repeats: int) -> tuple[float, Runs]:
    """The checkpoint's size in GB, and each method's runs, in turns."""
    found: Runs = {(way, name): [] for way in WAYS for name in METHODS}
    with tempfile.TemporaryDirectory() as temporary:
        source = SHAPES["neox-1b"][1](Path(temporary) / "source")[0]
        size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) / 1e9
        for _ in range(repeats):
            for way, name in found:
                (method, *options), out = METHODS[name], Path(temporary) / "out"
                command = [sys.executable, "-m", "normconvert", method, source, str(out), *options, *WAYS[way]]
                found[way, name].append(measure(command, out))
    return size, found


def section(size: float, found: Runs) -> str:
    """The section of the page."""
    rows = []
    for (way, name), own in found.items():
        seconds = sorted(run.seconds for run in own)
        rows.append(
            f"| {way} | {name} | {median(seconds):.1f} | {seconds[0]:.1f} – {seconds[-1]:.1f} | "
            f"{times(found, way, name):.2f} | {max(run.gigabytes for run in own):.2f} |"
        )
    return "\n".join(
        [
            "## The methods side by side", "",
            f"Written by `python -m tools.benchmarks.methods --write`: whole conversions, in turns, of {size:.2f} GB "
            "in the shape of GPT-NeoX, float32; verified as they are by default, and with `--no-verify`. Allowed: "
            f"{ALLOWED} × the time of `rmsnorm`.", "",
            "| | method | seconds | range | ÷ rmsnorm | peak GB |",
            "| --- | --- | ---: | --- | ---: | ---: |", *rows, "",
        ]
    )  # fmt: skip


def times(found: Runs, way: str, name: str) -> float:
    """A method's time as a multiple of rmsnorm's."""
    return median(run.seconds for run in found[way, name]) / median(run.seconds for run in found[way, "rmsnorm"])


def main() -> int:
    """Measure; exit status 1 if a method takes more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    size, found = runs(arguments.repeats)
    text = section(size, found)
    print(text)
    if arguments.write:
        write_section(DOCS / "performance.md", "methods", text, SECTIONS)
    late = [f"{name}, {way}" for way, name in found if times(found, way, name) > ALLOWED]
    print(f"more than allowed: {', '.join(late)}" if late else "all within what is allowed")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
