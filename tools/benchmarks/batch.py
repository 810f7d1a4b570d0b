"""Throughput of batches: one recipe of many small checkpoints by 1 and by 2 workers, as processes and on Ray.

    python tools/benchmarks/batch.py               # 40 checkpoints, 3 rounds: writes its section of docs/performance.md
    python tools/benchmarks/batch.py --small       # 4 checkpoints, 1 round, to try the script: prints the section

The four ways take turns, round by round, so that what else the machine does hits all alike. Each run is a whole
``normconvert run --force``, from the start of the process to its end, verification included. The Ray cluster is one of
this machine, with a node of one core for each worker; it runs before the clock starts, since a cluster is there before
one uses it. Without Ray its rows are left out, and the section says so. No round begins that would end after
``--minutes``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.docs.pages import sections, write_section  # noqa: E402

PAGE, SECTION = ROOT / "docs/performance.md", "batches"
WORKERS = (1, 2)
STORE = 80 << 20
"""Bytes of a node's object store, which the jobs do not use."""

Runs = dict[tuple[str, int], list[float]]
"""(executor, workers) -> seconds of each round."""


def make_checkpoints(folder: Path, count: int) -> int:
    """Small GPT-2s with weights of their own, and the recipe ``r.yaml`` for them; the bytes of one."""
    import torch

    from tests.support.tiny_checkpoints import gpt2, save

    for number in range(count):
        torch.manual_seed(number)
        save(gpt2(), folder / f"models/m{number:02}")
    (folder / "r.yaml").write_text("sources: [{folder: 'models/*'}]\noutput: out/{name}\n", encoding="utf-8")
    return (folder / "models/m00/model.safetensors").stat().st_size


def seconds_of(folder: Path, count: int, *options: str) -> float:
    """Wall seconds of one batch, started from nothing.

    Raises:
        RuntimeError: not every checkpoint was converted.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "normconvert", "run", "r.yaml", "--json", "-", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    converted = json.loads(done.stdout)["counts"]["converted"] if done.returncode == 0 else 0
    if converted != count:
        raise RuntimeError(f"{converted} of {count} converted: {done.stderr[-2000:]}")
    return seconds


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a Ray cluster of this machine: a head without cores, a node of one core for each worker."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(workers):
            made.add_node(num_cpus=1, memory=4 * 10**9, object_store_memory=STORE)
        made.wait_for_nodes()
        yield str(made.address)
    finally:
        made.shutdown()


def measure(folder: Path, count: int, rounds: int, minutes: float, say: Callable[[str], None]) -> Runs:
    """Every way once in each round."""
    found: Runs = {(executor, n): [] for executor in executors() for n in WORKERS}
    start = time.monotonic()
    for number in range(rounds):
        for executor, workers in found:
            if executor == "--jobs":
                seconds = seconds_of(folder, count, "--jobs", str(workers))
            else:
                with cluster(workers) as address:
                    seconds = seconds_of(folder, count, "--ray", address)
            found[executor, workers].append(seconds)
            say(f"round {number + 1}: {executor} {workers}: {seconds:.1f} s")
        if (time.monotonic() - start) * (number + 2) / (number + 1) > 60 * minutes:
            break
    return found


def executors() -> list[str]:
    """The executors that can be measured here."""
    return ["--jobs"] + (["--ray"] if find_spec("ray") else [])


def render(found: Runs, count: int, size: int, about: dict[str, Any]) -> str:
    """The section of the page."""
    rounds = len(next(iter(found.values())))
    lines = [
        "## Batches",
        "",
        f"`normconvert run` over {count} GPT-2 checkpoints of {size / 1e3:.0f} kB each, verification included, from "
        f"the start of the command to its end: median and range of {rounds} round{'s' if rounds > 1 else ''} in which "
        "the ways take turns. At this size a job is tracing, verifying and Python, not reading and writing. `--jobs N` "
        "gives each process its share of the cores, so that one worker has them all; a Ray node has one core, and the "
        "cluster runs already.",
        "",
        "| | workers | seconds | range | checkpoints a minute | of one worker's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (executor, workers), seconds in found.items():
        middle, one = statistics.median(seconds), statistics.median(found[executor, WORKERS[0]])
        lines.append(
            f"| `{executor}` | {workers} | {middle:.1f} | {min(seconds):.1f} – {max(seconds):.1f} | "
            f"{60 * count / middle:.1f} | {one / middle:.2f} × |"
        )
    if "--ray" not in executors():
        lines += ["", "Ray was not installed where this was measured."]
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("processor", "threads"))
    lines += ["", f"{about['processor']}, {os.cpu_count()} cores; {versions}. `python tools/benchmarks/batch.py`", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    count, rounds = (4, 1) if arguments.small else (arguments.count, arguments.rounds)
    import torch

    from normconvert.benchmark.machine import machine

    with tempfile.TemporaryDirectory() as name:
        size = make_checkpoints(Path(name), count)
        found = measure(Path(name), count, rounds, arguments.minutes, lambda line: print(line, flush=True))
    about = machine(torch.device("cpu"))
    if find_spec("ray"):
        import ray

        about["ray"] = ray.__version__
    text = render(found, count, size, about)
    if arguments.small:
        print(text)
        return 0
    _, there = sections(PAGE.read_text(encoding="utf-8"))
    write_section(PAGE, SECTION, text, [*there, SECTION])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
