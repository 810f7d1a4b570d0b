"""The coverage sweep: convert every model the installed libraries can build, in float64, and say what came of it.

Each model is built small, traced on the meta device, planned, and, if anything converts, built for real with perturbed
weights: the plan applied to float64 weights must equal the original. One process a model, two at a time, with a time
and a memory limit; every result is a line of a work file, so that an interrupted sweep goes on where it stopped.

    python tools/census/coverage.py                                  # everything -> docs/coverage.md
    python tools/census/coverage.py --method crmsnorm                # a column of that page, once it is there
    python tools/census/coverage.py --method fuse-bn                 # the page's section about BatchNorm
    python tools/census/coverage.py --library timm --only hiera_tiny_224 --fresh -v --out -
    python tools/census/coverage.py --stage trace                    # census of tracing only
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.census.one_model import Row, asks_others, first_line, sweep_one  # noqa: E402
from tools.census.sweep import Key, read_rows  # noqa: E402

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STAGES = ("build", "trace", "plan", "verify")
LIBRARIES = ("transformers", "timm")


def main(argv: list[str] | None = None) -> int:
    """Sweep, then write the page. Returns 1 if a converted model does not compute what its original computes."""
    from tools.census.coverage_page import state
    from tools.census.coverage_sections import is_wrong, summary, write_page
    from tools.census.zoo.methods import METHODS

    arguments = _parser().parse_args(argv)
    arguments.work = arguments.work or ROOT / "build" / METHODS[arguments.method].work
    keys = list(_keys(arguments.library or LIBRARIES, set(arguments.only), METHODS[arguments.method].norm))
    table = METHODS[arguments.method].column_of or arguments.method
    if table != arguments.method:
        tried = read_rows(ROOT / "build" / METHODS[table].work)
        keys = [key for key in keys if key in tried and state(tried[key]) in ("complete", "partly")]
    rows = {} if arguments.fresh else read_rows(arguments.work)
    known = {} if arguments.fresh else rows
    todo = [] if arguments.page_only else [key for key in keys if not _is_done(known.get(key), arguments)]
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh and not arguments.only:
        arguments.work.unlink(missing_ok=True)
    with arguments.work.open("a") as work:
        for done, row in enumerate(_sweep(todo, arguments, known), 1):
            rows[row["library"], row["name"]] = row
            work.write(json.dumps(row) + "\n")
            work.flush()
            if arguments.verbose:
                print(f"{done}/{len(todo)} {_one_line(row)}", flush=True)
    swept = [rows[key] for key in keys if key in rows]
    print(summary(swept, table))
    if str(arguments.out) != "-":
        if table != arguments.method:
            keys = list(_keys(arguments.library or LIBRARIES, set(arguments.only), METHODS[table].norm))
            swept = [tried[key] for key in keys if key in tried]
        _add_columns(swept, table)
        write_page(arguments.out, table, swept, _versions(), left=len(keys) - len(swept))
    return int(any(is_wrong(row, table) for row in swept))


def _parser() -> argparse.ArgumentParser:
    from tools.census.zoo.methods import METHODS

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--method", choices=list(METHODS), default="rmsnorm", help="the conversion (default: rmsnorm)")
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="default: both")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types or timm model names")
    parser.add_argument("--stage", choices=STAGES, default="verify", help="how far to go (default: verify)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=120, help="processor time for one model")
    parser.add_argument("--gigabytes", type=float, default=8, help="memory limit for one model")
    parser.add_argument("--min-gain", type=int, default=None)
    parser.add_argument("--allow-shifted-outputs", action="store_true")
    parser.add_argument("--ours", action="store_true", help="leave the other tools to a later run")
    parser.add_argument("--work", type=Path, default=None, help="results so far (default: one file a method in build/)")
    parser.add_argument("--fresh", action="store_true", help="sweep again what the work file already has")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md", help="the page, or - for none")
    parser.add_argument("--page-only", action="store_true", help="sweep nothing; write the page of what is there")
    parser.add_argument("-v", "--verbose", action="store_true")
    return parser


def _is_done(row: Row | None, arguments: argparse.Namespace) -> bool:
    """Whether nothing is left to find out about a model, other tools included if they are asked for."""
    return row is not None and ("taken" not in row or "others" in row or not asks_others(arguments))


def _keys(libraries: Iterable[str], only: set[str], norm: str) -> Iterator[Key]:
    from tools.census.zoo.timm_zoo import timm_names
    from tools.census.zoo.transformers_zoo import transformers_types

    for library in libraries:
        names = transformers_types() if library == "transformers" else timm_names(norm)
        # Any timm model may be named, not only those of the table.
        extra = sorted(only - set(names)) if library == "timm" and list(libraries) == ["timm"] else []
        yield from ((library, name) for name in [*names, *extra] if not only or name in only)


def _add_columns(rows: list[Row], table: str) -> None:
    """Give rows what other methods, which have no table of their own, did with the same models, if they were swept."""
    from tools.census.zoo.methods import METHODS

    for name, method in METHODS.items():
        found = read_rows(ROOT / "build" / method.work) if method.column_of == table else {}
        for row in rows:
            if (other := found.get((row["library"], row["name"]))) is not None:
                row[name] = other


def _versions() -> dict[str, str]:
    import timm
    import torch
    import transformers

    return {m.__name__: str(m.__version__).split("+")[0] for m in (torch, transformers, timm)}


def _one_line(row: Row) -> str:
    if "skipped" in row:
        what = "skipped: " + row["skipped"]
    elif "failure" in row:
        what = f"{row['cause']}: {row['failure']}"
    else:
        what = f"{row.get('converted', '-')}/{row.get('norms', '-')} error {row.get('error', '-')}"
        what += " MISMATCH" if row.get("mismatch") else ""
        what += f" {row['reasons']}" if row.get("reasons") else ""
    return f"{row['library']} {row['name']} {what}  [{row['seconds']} s]"[:250]


def _sweep(keys: list[Key], arguments: argparse.Namespace, known: dict[Key, Row]) -> Iterator[Row]:
    """Results in the order they come. Children are forked after the imports, which would cost more than the models."""
    _preload(arguments.method)
    context = multiprocessing.get_context("fork")
    queue = list(reversed(keys))
    running: dict[Connection, tuple[Key, Any, float]] = {}
    while queue or running:
        while queue and len(running) < arguments.jobs:
            key = queue.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, key, arguments, known.get(key)), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (key, process, time.monotonic())
        ready = set(wait(list(running), timeout=1.0))
        for receiver in list(running):
            key, process, started = running[receiver]
            spent = time.monotonic() - started
            if receiver in ready:
                try:
                    row = receiver.recv()
                except EOFError:
                    process.join()
                    row = {"failure": f"the process ended with status {process.exitcode}", "cause": "memory"}
                    if process.exitcode == -signal.SIGXCPU:
                        row = {"failure": f"more than {arguments.seconds} s of processor time", "cause": "time"}
            elif spent > 5 * arguments.seconds:
                process.kill()
                row = {"failure": f"more than {5 * arguments.seconds} s", "cause": "time"}
            else:
                continue
            process.join()
            receiver.close()
            del running[receiver]
            if key in known and "failure" in row:  # the other tools failed as a whole; what ours did stands
                row = {**known[key], "others": {}, "others_failure": row["failure"]}
            yield {"library": key[0], "name": key[1], **row, "seconds": round(spent, 1)}


def _preload(method: str) -> None:
    import warnings

    import timm
    import torch
    import transformers

    import normconvert.rewrites.planning
    import normconvert.verification.equivalence  # noqa: F401
    from tools.census.zoo.methods import warm_up

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    timm.list_modules()
    warm_up(method)


def _child(sender: Connection, key: Key, arguments: argparse.Namespace, known: Row | None) -> None:
    import logging

    _limit(arguments.gigabytes, arguments.seconds)
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    from tools.census.zoo.methods import with_others

    try:
        row = (
            sweep_one(key[0], key[1], arguments)
            if known is None
            else with_others(key[0], key[1], known, arguments.method)
        )
    except BaseException as error:  # the row must say what happened, whatever it was
        row = {"failure": first_line(error), "cause": "memory" if _is_memory(error) else "sweep"}
    sender.send(row)
    sender.close()
    # No clean-up of a forked interpreter: it can hang on what its parent held.
    os._exit(0)


def _limit(gigabytes: float, seconds: int) -> None:
    """Memory beyond what the parent mapped, and processor time: wall time would judge the other programs too."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate" in str(error)


if __name__ == "__main__":
    sys.exit(main())
