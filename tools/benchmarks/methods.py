"""What each change of basis costs beside ``rmsnorm``: whole conversions of one checkpoint, side by side.

    python -m tools.benchmarks.methods [--repeats 3] [--write]

Makes a checkpoint in the shape of GPT-NeoX with 1.0B parameters in float32 and random weights in a temporary folder,
and converts it by every method in turn without a verification, as processes of their own. ``--write`` writes the
section of docs/performance.md; for figures the machine must be idle. About six minutes, 10 GB of disk.
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
ALLOWED = 1.5
"""What a method may take, as a multiple of rmsnorm's time."""


def runs(repeats: int) -> tuple[float, dict[str, list[Run]]]:
    """The checkpoint's size in GB, and each method's runs, in turns."""
    found: dict[str, list[Run]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as temporary:
        source = SHAPES["neox-1b"][1](Path(temporary) / "source")[0]
        size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) / 1e9
        for _ in range(repeats):
            for name, (method, *options) in METHODS.items():
                out = Path(temporary) / "out"
                command = [sys.executable, "-m", "normconvert", method, source, str(out), *options, "--no-verify"]
                found[name].append(measure(command, out))
    return size, found


def section(size: float, found: dict[str, list[Run]]) -> str:
    """The section of the page."""
    base = median(run.seconds for run in found["rmsnorm"])
    rows = []
    for name, own in found.items():
        seconds = sorted(run.seconds for run in own)
        rows.append(
            f"| {name} | {median(seconds):.1f} | {seconds[0]:.1f} – {seconds[-1]:.1f} | {median(seconds) / base:.2f} | "
            f"{max(run.gigabytes for run in own):.2f} |"
        )
    return "\n".join(
        [
            "## The methods side by side", "",
            "Written by `python -m tools.benchmarks.methods --write`: whole conversions, not verified, in turns, of "
            f"{size:.2f} GB in the shape of GPT-NeoX, float32. Allowed: {ALLOWED} × the time of `rmsnorm`.", "",
            "| method | seconds | range | ÷ rmsnorm | peak GB |",
            "| --- | ---: | --- | ---: | ---: |", *rows, "",
        ]
    )  # fmt: skip


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
    base = median(run.seconds for run in found["rmsnorm"])
    late = [name for name, own in found.items() if median(run.seconds for run in own) > ALLOWED * base]
    print(f"more than allowed: {', '.join(late)}" if late else "all within what is allowed")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
