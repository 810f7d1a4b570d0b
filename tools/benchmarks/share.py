"""What share of a call of a whole model its norms take: LayerNorm in the original, RMSNorm in the converted model.

    python -m tools.benchmarks.share [--models gpt2] [--tokens 1 32 512] [--dtype float32 bfloat16] [--threads 1]
                                [--rounds 40] [--write]

The clock runs around each norm where it stands in the model, between products that have emptied the caches. It counts
processor time of the one thread, so that other work on the machine does not count (with more threads it is the wall's).
Each figure is the lower quartile of the rounds, in which the models take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconvert
from normconvert.benchmark.machine import machine
from normconvert.benchmark.versions import own_memory
from normconvert.report.benchmark import machine_in_words
from normconvert.sources import open_source
from tools.benchmarks.models import DOCS, SECTIONS, SHAPES, make
from tools.docs.pages import write_section


class Clocked:
    """Adds up the time that some modules of a model take.

    Args:
        modules: their calls are timed; none lies within another.
        clock: seconds so far.
    """

    def __init__(self, modules: Sequence[nn.Module], clock: Callable[[], float]) -> None:
        self.clock, self.spent, self.start = clock, 0.0, 0.0
        self.handles = [module.register_forward_pre_hook(self._begin) for module in modules]
        self.handles += [module.register_forward_hook(self._end) for module in modules]

    def remove(self) -> None:
        """Time no more."""
        for handle in self.handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.start = self.clock()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.spent += self.clock() - self.start


def shares(
    models: Mapping[str, nn.Module],
    timed: Mapping[str, Sequence[nn.Module]],
    inputs: Mapping[str, Any],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, tuple[float, float]]:
    """Version -> (seconds of a call, seconds of its timed modules), the models in turns.

    Args:
        models: the versions.
        timed: of each version the modules that are timed.
        inputs: of a call.
        rounds: how many, after one that warms up.
        clock: seconds so far.
    """
    clocks = {name: Clocked(modules, clock) for name, modules in timed.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name in list(models) if turn % 2 else reversed(list(models)):
                clocks[name].spent, start = 0.0, clock()
                models[name](**inputs)
                if turn:
                    found[name].append((clock() - start, clocks[name].spent))
    for one in clocks.values():
        one.remove()
    return {name: (_quartile([c for c, _ in pairs]), _quartile([p for _, p in pairs])) for name, pairs in found.items()}


def _quartile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


def norms_of(model: nn.Module) -> list[nn.Module]:
    """LayerNorms and what stands in their place."""
    return [m for m in model.modules() if type(m).__name__ in ("LayerNorm", "RMSNorm")]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = [name for name, shape in SHAPES.items() if shape.library == "transformers"]
    parser.add_argument("--models", nargs="+", choices=text, default=["gpt2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 512])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for name in options.models:
        for row in rows_of(name, options):
            print(row, flush=True)
            lines.append(row)
    if options.write:
        page = section(lines, machine_in_words(machine(torch.device("cpu"))))
        write_section(DOCS / "performance.md", "share", page, SECTIONS)


def rows_of(name: str, options: argparse.Namespace) -> Iterator[str]:
    """The table's rows of one model."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        source = make(SHAPES[name], Path(folder) / "source", small=False)
        normconvert.convert(source, Path(folder) / "out", verify=False)
        for dtype in options.dtype:
            kind = getattr(torch, dtype)
            models = {
                "original": own_memory(open_source(str(source)).load(dtype=kind)),
                "converted": own_memory(normconvert.load(Path(folder) / "out", dtype=kind)),
            }
            timed = {key: norms_of(model) for key, model in models.items()}
            for tokens in options.tokens:
                inputs = {"input_ids": torch.randint(0, 1000, (1, tokens)), "use_cache": False, "logits_to_keep": 1}
                found = shares(models, timed, inputs, options.rounds, clock)
                (call, before), (_, after) = found["original"], found["converted"]
                yield (
                    f"| {SHAPES[name].title} | {dtype} | {tokens} | {1e3 * call:.4g} ms | {1e3 * before:.3g} ms | "
                    f"{1e3 * after:.3g} ms | {(after - before) / call:+.2%} |"
                )


def section(rows: Sequence[str], about: str) -> str:
    """The section of the page."""
    return "\n".join([
        "## The norms' share of a call",
        "",
        "Written by `python -m tools.benchmarks.share --write`. Time of the norms where they stand in the model, "
        "LayerNorm in the original and RMSNorm in the converted model, and the difference as a share of the original's "
        "call; batch 1, no cache, random perturbed weights. Processor time of the one thread that computes, lower "
        f"quartiles of rounds in which the models take turns. {about}.",
        "",
        "| model | dtype | tokens | a call | its LayerNorms | RMSNorms | more, of a call |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
