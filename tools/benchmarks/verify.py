"""Verification of a model larger than the memory allowed: ``verify --max-memory`` on 8 GB of float16 in 4 GB.

    python -m tools.benchmarks.verify [--layers 18] [--width 4096] [--memory 4GB] [--write]

Makes a checkpoint in the shape of GPT-NeoX with random weights in a temporary folder (17 GB of disk), converts it,
verifies it in a process of its own and looks at that process's peak memory; exit status 1 if the verification fails or
takes more. About 15 minutes on two idle cores; ``--layers 2 --width 512 --memory 1GB`` tries it. ``--write`` writes its
section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from normconvert.option_fields import parse_size
from tools.benchmarks.convert import Run, measure, sizes

DOCS = Path(__file__).parents[2] / "docs"


def section(stored: int, largest: int, limit: int, run: Run, figures: dict[str, float]) -> str:
    """The section of the page."""
    return "\n".join(
        [
            "## Verification in little memory",
            "",
            "Written by `python -m tools.benchmarks.verify --write`.",
            "",
            f"A float16 checkpoint of {stored / 1e9:.2f} GB in the shape of GPT-NeoX (largest tensor "
            f"{largest / 1e6:.0f} MB) and its conversion, by `normconvert verify A B --max-memory`: allowed "
            f"{limit / 1e9:.2f} GB, peak {run.gigabytes:.2f} GB, {run.seconds:.0f} s ({run.processor:.0f} s of "
            f"processor time). Algebra {figures['algebra']:.1e}, rounding {figures['rounding']:.3g} × the original's, "
            f"top-1 {figures['top1']:.2%}.",
            "",
        ]
    )


def main() -> int:
    """Make, convert, verify; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    limit = parse_size(arguments.memory, "--memory")
    with tempfile.TemporaryDirectory() as temporary:
        source, out, report = (Path(temporary) / name for name in ("neox", "out", "report.json"))
        # by processes of their own: a child's peak memory starts at its parent's, which must stay small
        size = ["--layers", str(arguments.layers), "--width", str(arguments.width)]
        subprocess.run([sys.executable, "-m", "tools.benchmarks.convert", *size, "--make", str(source)], check=True)
        command = [sys.executable, "-m", "normconvert"]
        subprocess.run([*command, "rmsnorm", str(source), str(out), "--no-verify"], check=True)
        tensors = sizes(source)
        verify = [*command, "verify", str(source), str(out), "--max-memory", str(limit), "--json", str(report)]
        run = measure(verify, Path(temporary) / "nothing")
        figures = json.loads(report.read_text())
    text = section(sum(tensors), max(tensors), limit, run, figures)
    print(text)
    if arguments.write:
        from tools.benchmarks.models import SECTIONS
        from tools.docs.pages import write_section

        write_section(DOCS / "performance.md", "verification", text, SECTIONS)
    return 0 if run.gigabytes * 1e9 <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
