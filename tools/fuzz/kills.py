"""``python -m tools.fuzz.kills [N]``: commands ended by signals at random moments, and what is left of the output.

    python -m tools.fuzz.kills 60

Each command runs in a process of its own and gets SIGKILL, SIGTERM, SIGINT or SIGHUP (INT sometimes twice) somewhere
between its start and its end. Afterwards the output has to be the old one, whole, or the new one, whole, or not there;
nothing else may be left, but for SIGKILL and for ``--stream``, which keeps the shards that it has done: after these
nothing once the same command has run again. ``--stream`` reads from a hub on the loopback.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGKILL: -9}
RECIPE = "sources: [demo:gpt2]\ndefaults: {verify: false}\noutput: out\n"
COMMANDS: dict[str, list[str]] = {
    "convert": ["rmsnorm", "demo:gpt2", "out"],
    "overwrite": ["rmsnorm", "demo:gpt2", "out", "--overwrite", "--dtype", "bfloat16", "--no-verify"],
    "stream": ["rmsnorm", "org/sharded", "out", "--stream"],
    "run": ["run", "r.yaml"],
    "run --force": ["run", "r.yaml", "--force"],
}


@contextmanager
def hub(root: Path) -> Iterator[None]:
    """A hub on the loopback with one model of several shards, to which all commands that are started here are led."""
    from tests.support.hub_server import Repository, serve
    from tests.support.tiny_checkpoints import gpt2, save

    with serve({"org/sharded": Repository(save(gpt2(), root / "sharded", "sharded"))}) as server:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        yield


def digest(folder: Path) -> str | None:
    """Of the files that make a model; None if there is no folder."""
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".cache" not in path.parts:
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    """A command in a folder of its own."""
    command = [sys.executable, "-m", "normconvert", *COMMANDS[name]]
    pipe = subprocess.PIPE
    # A cache of its own: a shard that is there already is not streamed.
    home = os.environ | {"HF_HOME": str(folder.with_name(f"cache {folder.name}"))}
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=home)


def prepare(name: str, folder: Path) -> None:
    """What is there before the command: a recipe, and an old output where one is replaced."""
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE)
    if name in ("overwrite", "run --force"):
        first = "run" if name.startswith("run") else "convert"
        start(first, folder).communicate()


def attempt(name: str, number: signal.Signals, after: float, folder: Path, whole: set[str | None]) -> str:
    """End one command after so many seconds; what is wrong then, or nothing."""
    old = digest(folder / "out")
    process = start(name, folder)
    time.sleep(after)
    process.send_signal(number)
    if number == signal.SIGINT and after > 1:
        time.sleep(0.05)
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    found, left = digest(folder / "out"), sorted(path.name for path in folder.iterdir())
    wrong = []
    if found not in {old, *whole}:
        wrong.append("the output is neither the old nor the new one")
    if number != signal.SIGKILL:
        if process.returncode not in (0, STATUS[number]):
            # Before the program's first line Python itself is ended, by its own rules.
            early = process.returncode == -number and not errors
            wrong += [] if early else [f"status {process.returncode}"]
        if "Traceback" in errors:
            wrong.append(f"a traceback: {errors.strip()}")
        known = ("r.yaml", "out", *((".out.stream",) if name == "stream" else ()))
        if extra := [entry for entry in left if entry not in known]:
            wrong.append(f"left: {extra}")
    if number == signal.SIGKILL or (name == "stream" and found is None):
        again = start(name, folder)
        again.communicate()
        left = sorted(path.name for path in folder.iterdir())
        if left != ["out", "r.yaml"] or digest(folder / "out") not in whole:
            wrong.append(f"after another run: {left}, status {again.returncode}")
    return "; ".join(wrong)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, counts, failures = random.Random(arguments.seed), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="kills-") as root, hub(Path(root)):
        seconds: dict[str, float] = {}
        whole: dict[str, set[str | None]] = {}
        for name in COMMANDS:
            folder = Path(root) / f"whole {name}"
            prepare(name, folder)
            begun = time.monotonic()
            start(name, folder).communicate()
            seconds[name], whole[name] = time.monotonic() - begun, {digest(folder / "out")}
        for number in range(arguments.count):
            name, kind = list(COMMANDS)[number % len(COMMANDS)], SIGNALS[number // len(COMMANDS) % len(SIGNALS)]
            folder = Path(root) / str(number)
            prepare(name, folder)
            after = draw.uniform(0.0, seconds[name] * 1.05)
            wrong = attempt(name, kind, after, folder, whole[name])
            counts[f"{name} {kind.name}: {'failed' if wrong else 'good'}"] += 1
            row = f"{name} {kind.name} after {after:.2f} s: {wrong or 'good'}"
            print(f"{number + 1}/{arguments.count} {row}", file=sys.stderr, flush=True)
            if wrong:
                failures.append(row)
    for row, count in sorted(counts.items()):
        print(f"{row:32}{count:6}")
    print(f"{arguments.count} ended at random, {len(failures)} failures", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
