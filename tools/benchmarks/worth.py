"""What machinery that could go is worth: a command, or a whole model's call, with it and without it, in turns.

    python -m tools.benchmarks.worth [--repeats 5] [--write]

- ``lean_export``: traces without stacks and code (`normconvert.compat.lean_export`); a whole command.
- ``noted``: markers that are noted in a graph without being run (there, too); a whole command.
- ``deferred``: an import that waits until it is called (`normconvert.sources.deferred`); a whole command.
- ``Padded``: linear maps of an odd number of results (`normconvert.runtime.padding`); calls of a GPT-2 in crmsnorm.

What wins less than 2 % is to go. ``--write`` writes its section of docs/performance.md. About eight minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.benchmarks.convert import measure
from tools.benchmarks.models import DOCS, SECTIONS
from tools.docs.pages import write_section

LEAST = 1.02
"""How many times as long something has to take without it."""
WITHOUT = """
import contextlib, importlib, sys
module = importlib.import_module({module!r})
setattr(module, {name!r}, {instead})
sys.argv[0] = "normconvert"
from normconvert.__main__ import main
main()
"""
_NOTHING = "lambda *args: contextlib.nullcontext()"
IN_COMMANDS = {
    "lean_export": ("normconvert.tracing.graph", _NOTHING),
    "noted": ("normconvert.tracing.known_values", "lambda operation, *args: operation(*args)"),
    "deferred": ("normconvert.sources.transformers_models", _NOTHING),
}
"""What is replaced, in which module, and by what."""
CALLS = {"forward 8 x 32": (8, 32), "forward 8 x 256": (8, 256)}
Cell = tuple[str, str, list[float], list[float]]
"""What it is, what was run, processor seconds with it and without it: other work of the machine changes the others."""


def commands(name: str, repeats: int) -> Cell:
    """A conversion without a verification."""
    found: tuple[list[float], list[float]] = [], []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        arguments = ["rmsnorm", "demo:gpt2", str(out), "--no-verify"]
        module, instead = IN_COMMANDS[name]
        without = WITHOUT.format(module=module, name=name, instead=instead)
        for _ in range(repeats):
            for seconds, start in zip(found, (["-m", "normconvert"], ["-c", without]), strict=True):
                seconds.append(measure([sys.executable, *start, *arguments], out).processor)
    return name, "`rmsnorm demo:gpt2 --no-verify`", *found


@contextmanager
def _padded_from(*rows: float) -> Iterator[None]:
    from normconvert.runtime import padding

    before: Any = padding.PADDED_FROM
    padding.PADDED_FROM = rows  # type: ignore[assignment]
    try:
        yield
    finally:
        padding.PADDED_FROM = before


def calls(repeats: int) -> Iterator[Cell]:
    """Calls of one converted model, loaded twice: parameters move in memory when they are first padded."""
    import normconvert
    from normconvert.runtime import PADDED_FROM
    from normconvert.sources.converted import load
    from tools.benchmarks.verified import SHAPES

    with tempfile.TemporaryDirectory() as temporary:
        source = SHAPES["gpt2-124m"][1](Path(temporary) / "source")[0]
        normconvert.convert(source, Path(temporary) / "out", "crmsnorm", verify=False)
        models = [load(Path(temporary) / "out").eval() for _ in range(2)]
        never = float("inf"), float("inf")
        for name, shape in CALLS.items():
            tokens = torch.randint(0, 1000, shape)
            found: tuple[list[float], list[float]] = [], []
            ways = list(zip(found, models, (PADDED_FROM, never), strict=True))
            for turn in range(6 * repeats):
                for seconds, model, rows in ways if turn % 2 else reversed(ways):
                    with _padded_from(*rows), torch.inference_mode():
                        seconds.append(_timed(partial(model, tokens, use_cache=False)))
            yield "Padded", f"GPT-2 124M in crmsnorm, {name}", *found


def _timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def worth(cell: Cell) -> float:
    """How many times as long it takes without: the median of the pairs."""
    return median(other / own for own, other in zip(cell[2], cell[3], strict=True))


def section(cells: list[Cell]) -> str:
    """The section of the page."""
    rows = [
        f"| {name} | {what} | {median(own):.3f} ({min(own):.3f} – {max(own):.3f}) | "
        f"{median(other):.3f} ({min(other):.3f} – {max(other):.3f}) | {worth((name, what, own, other)):.3f} |"
        for name, what, own, other in cells
    ]
    return "\n".join(
        [
            "## What machinery is worth", "",
            "Written by `python -m tools.benchmarks.worth --write`: processor seconds with and without, in turns,",
            f"median (range); calls on one thread. What wins less than {LEAST - 1:.0%} everywhere is to go.", "",
            "| | run | with | without | without ÷ with |", "| --- | --- | ---: | ---: | ---: |", *rows, "",
        ]
    )  # fmt: skip


def main() -> int:
    """Measure; exit status 1 if something wins nowhere what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = [commands(name, arguments.repeats) for name in IN_COMMANDS] + list(calls(arguments.repeats))
    text = section(cells)
    print(text)
    if arguments.write:
        write_section(DOCS / "performance.md", "worth", text, SECTIONS)
    best: dict[str, float] = {}
    for cell in cells:
        best[cell[0]] = max(best.get(cell[0], 0.0), worth(cell))
    poor = [name for name, times in best.items() if times < LEAST]
    print(f"to go: {', '.join(poor)}" if poor else "all are worth it")
    return 1 if poor else 0


if __name__ == "__main__":
    sys.exit(main())
