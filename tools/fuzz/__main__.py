"""``python -m tools.fuzz [N]``: N broken inputs (3,000), and what came of them.

    python -m tools.fuzz 3000 --seed 1

Everything runs in this process, in a folder of its own. A traceback, a message that calls bad input a bug, more than
10 s of processor time or 1 GB, code that ran and a file that was touched are failures; the exit status is then 1, and
the inputs lie in the folder that is named.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from normconvert.errors import NormConvertError
from tools.fuzz.doors import Door, doors, prepare

SECONDS, BYTES = 10.0, 1 << 30


@dataclass
class Found:
    """What came of the inputs: outcome -> how many; and the failures, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(count: int, seed: int, keep: Path | None = None) -> Found:
    """Try ``count`` inputs, or a few more, shared out over all doors.

    Args:
        count: how many, at least.
        seed: the same gives the same inputs.
        keep: a folder for the inputs that failed.
    """
    found = Found()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, _limited():
        root = Path(folder).resolve()
        prepare(root)
        all_doors = doors(root)
        total = sum(door.share for door in all_doors)
        for door in all_doors:
            _through(door, root, math.ceil(count * door.share / total), seed, found, keep)
    return found


@contextmanager
def _limited() -> Iterator[None]:
    """Memory that cannot grow by far more than is allowed: a bomb is an error, and no dead machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(ValueError, OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _through(door: Door, root: Path, count: int, seed: int, found: Found, keep: Path | None) -> None:
    file = root / door.file
    right = file.read_bytes() if file.is_file() else None
    guarded = _state(root, file)

    @seeded(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(door.inputs)
    def attempt(content: bytes) -> None:
        file.write_bytes(content)
        outcome, why = _outcome(door, root)
        if (root / "ran").exists():
            why = "code of the input ran"
            (root / "ran").unlink()
        elif _state(root, file) != guarded:
            why = "another file was touched"
        found.counts[f"{door.name}: {'failed' if why else outcome}"] += 1
        if why:
            found.failures.append(f"{door.name}: {why}")
            if keep is not None:
                keep.mkdir(exist_ok=True)
                (keep / f"{len(found.failures)}-{file.name}").write_bytes(content)

    attempt()
    if right is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(right)


def _outcome(door: Door, root: Path) -> tuple[str, str]:
    """What came of one input, and why that is a failure (empty if it is none)."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        door.enter(root)
        outcome, why = "taken", ""
    except NormConvertError as error:
        outcome, why = "refused", "a bug" if "a bug in normconvert" in str(error) else ""
    except Exception as error:
        outcome, why = "failed", "".join(traceback.format_exception(error)[-3:])
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if not why and seconds > SECONDS:
        why = f"{seconds:.1f} s of processor time"
    if not why and grown > BYTES:
        why = f"{grown} bytes more"
    return outcome, why


def _state(root: Path, file: Path) -> dict[str, tuple[int, int]]:
    """Every file but the one that is broken on purpose."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*")) if path != file and not path.is_dir() and path.name != "ran"
    }  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    given_arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if given_arguments.seed is None else given_arguments.seed
    shutil.rmtree(given_arguments.keep, ignore_errors=True)
    found = fuzz(given_arguments.count, seed, given_arguments.keep)
    for name, count in sorted(found.counts.items()):
        print(f"{name:32}{count:6}")
    print(f"{sum(found.counts.values())} inputs, seed {seed}: {len(found.failures)} failures")
    for failure, count in Counter(found.failures).most_common():
        print(f"\n{count} x {failure}", file=sys.stderr)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
