"""The command line: see :mod:`tools.benchmarks.gpu`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from normconvert.benchmark.machine import machine
from tools.benchmarks import gpu
from tools.benchmarks.gpu.groups import GROUPS, set_up
from tools.benchmarks.gpu.pages import write_pages
from tools.benchmarks.gpu.rows import Results
from tools.benchmarks.gpu.running import run
from tools.benchmarks.gpu.tasks import START, Setting, Task, estimated, ordered, that_fit

DOCS = Path(__file__).resolve().parents[3] / "docs"
RESULTS = DOCS / "results" / "gpu.json"
WHEELS = {
    "triton": "nothing can be compiled",
    "liger-kernel": "its kernels are not measured",
}
"""Package -> what is missing without it."""
SMALL_SECONDS = 0.05


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks.gpu", description=gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it stops, with what it has")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of interleaved calls in a row; five rounds at least"
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="every code path, with toys")
    parser.add_argument("--plan", action="store_true", help="print the rows with their estimated seconds, and stop")
    parser.add_argument("--json", type=Path, help=f"keep the rows in this file (--write: {RESULTS.name})")
    parser.add_argument("--write", action="store_true", help="write the pages and docs/results/")
    parser.add_argument("--merge", type=Path, nargs="?", const=RESULTS, metavar="FILE",
                        help="write the pages from a file, and stop")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.small and options.write:
        parser.error("--small is not worth writing down")
    if options.minutes <= 0 or options.seconds <= 0:
        parser.error("--minutes and --seconds are more than 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, merge or measure; the exit status."""
    began = time.monotonic()
    options = parse(arguments)
    if options.merge is not None:
        return merge(options.merge)
    groups = [GROUPS[name] for name in GROUPS if name in options.only]
    every = ordered(groups, options.small)
    tasks = that_fit(every, set_up, 60 * options.minutes)
    if options.plan:
        show_plan(every, tasks)
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"device {options.device!r} cannot be used here: torch {torch.__version__} sees no CUDA GPU",
              file=sys.stderr)  # fmt: skip
        return 2
    for package, without in WHEELS.items():
        if not _version(package):
            print(f"{package} is not installed: {without}", flush=True)
    if options.small:
        torch.compiler.set_stance("default", force_backend="eager")
    shown = sys.argv[1:] if arguments is None else arguments
    path = options.json or (RESULTS if options.write else None)
    results = Results(path, about(device, options.small, shown))
    setting = Setting(device, options.small, SMALL_SECONDS if options.small else options.seconds)
    run(tasks, setting, results, began + 60 * options.minutes, lambda line: print(line, flush=True))
    if len(tasks) < len(every):
        print(f"{len(every) - len(tasks)} further rows take more than {options.minutes:g} minutes: --minutes")
    if options.write:
        write_pages(DOCS, results.document())
    return 0


def about(device: torch.device, small: bool, arguments: Sequence[str]) -> dict[str, Any]:
    """What the pages say beside the rows."""
    packages = ("timm", "normconvert", *WHEELS)
    return {
        "machine": machine(device),
        "versions": {name: found for name in packages if (found := _version(name))},
        "small": small,
        "command": " ".join(["python", "-m", "tools.benchmarks.gpu", *arguments]),
    }


def _version(package: str) -> str:
    """Of an installed package; empty if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def show_plan(every: Sequence[Task], tasks: Sequence[tuple[Task, float]]) -> None:
    """The rows that fit, with their estimated seconds, and how many do not."""
    print(f"{START:6.0f} s  start")
    for task, seconds in tasks:
        print(f"{seconds:6.1f} s  {task.group}: {task.name}")
    total = START + sum(seconds for _, seconds in tasks)
    print(f"{total:6.0f} s  {len(tasks)} rows, estimated for a data-centre GPU")
    rest = list(estimated(every[len(tasks) :], set_up))
    if rest:
        print(f"{sum(seconds for _, seconds in rest):6.0f} s  {len(rest)} further rows, with more --minutes")


def merge(path: Path) -> int:
    """Write the pages from a file; from none, if the usual one is not there, that nothing was measured."""
    if not path.exists() and path != RESULTS:
        print(f"{path}: no such file; expected the JSON that --json or --write writes", file=sys.stderr)
        return 2
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    write_pages(DOCS, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
