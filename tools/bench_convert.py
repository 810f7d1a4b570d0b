"""Time and memory of one conversion as a whole process: a GPT-2 small checkpoint, 124M parameters in float32.

Usage: ``python tools/bench_convert.py [--runs 3]``. Weights are random, on disk in a temporary folder, page cache warm.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_checkpoint(folder: Path) -> None:
    """A randomly initialised GPT-2 small, as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


def measure(source: Path, out: Path) -> tuple[float, float]:
    """Wall seconds and peak resident GB of ``normconvert rmsnorm SOURCE OUT --no-verify``, imports included."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "normconvert", "rmsnorm", str(source), str(out), "--no-verify", "-q"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"the conversion failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 1e6


def main() -> None:
    """Print the median and the spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "gpt2-small", Path(folder) / "out"
        make_checkpoint(source)
        measure(source, out)  # warm
        rows = [measure(source, out) for _ in range(arguments.runs)]
    seconds, gigabytes = [r[0] for r in rows], [r[1] for r in rows]
    print(f"seconds    median {statistics.median(seconds):.1f}  ({min(seconds):.1f} to {max(seconds):.1f})")
    print(f"peak GB    median {statistics.median(gigabytes):.2f}  ({min(gigabytes):.2f} to {max(gigabytes):.2f})")


if __name__ == "__main__":
    main()
