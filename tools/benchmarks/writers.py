"""Linear maps of an odd number of results, which crmsnorm makes, beside those of one result more.

    python -m tools.benchmarks.writers [--threads N] [--seconds 1] [--write]

The map writes into a stream of d - 1 channels, 4 d numbers in, and its result is added to the stream. *plain* is
``torch.nn.functional.linear`` with d - 1 results, *padded* the module as a conversion leaves it
(`normconvert.runtime.Padded`), both as speeds relative to d results; medians of interleaved rounds. ``PADDED_FROM`` of
the runtime comes from here. ``--write`` writes the section of docs/performance.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconvert.benchmark.machine import machine
from normconvert.benchmark.timing import Step, interleave, spread, warm_up
from normconvert.report.benchmark import machine_in_words
from normconvert.runtime import PADDED_FROM, apply_module_edits, padding
from tools.benchmarks.fuse import SECTIONS
from tools.docs.pages import write_section

WIDTHS = (192, 384, 768)
ROWS = (1, 8, 16, 32, 64, 197, 2048)
MEMORY = 1 << 26
"""Bytes of the weights that take turns: as in a model, they come from memory and not from a cache."""


def _linear(width: int) -> nn.Linear:
    return nn.Linear(4 * width, width)


def _conv1d(width: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(width, 4 * width)


KINDS: dict[str, Callable[[int], Any]] = {"Linear": _linear, "Conv1D": _conv1d}


def resized(kind: str, width: int) -> Any:
    """The map with one result less, as a conversion leaves it."""
    model = nn.Sequential(KINDS[kind](width))
    weight = list(model[0].get_parameter("weight").shape)
    weight[weight.index(width)] -= 1
    name = {"Linear": "out_features", "Conv1D": "nf"}[kind]
    row = {"op": "resize", "path": "0", "name": "weight", "shape": weight, "set": {name: width - 1}}
    apply_module_edits(model, [row, {"op": "resize", "path": "0", "name": "bias", "shape": [width - 1]}])
    return model[0]


def cells(seconds: float) -> Iterator[tuple[str, int, int, float, dict[str, float]]]:
    """(kind, width, rows, milliseconds at the even width, speeds relative to it)."""
    cpu = torch.device("cpu")
    for kind in KINDS:
        for width in WIDTHS:
            count = max(1, MEMORY // (16 * width**2))
            even, odd = [KINDS[kind](width) for _ in range(count)], [resized(kind, width) for _ in range(count)]
            weights = [one.weight.detach().clone() for one in odd]  # before the first call moves it
            weights = [w if kind == "Linear" else w.t() for w in weights]
            for rows in ROWS:
                x, stream = torch.randn(rows, 4 * width), torch.randn(rows, width)
                rest = stream[:, :-1].clone()

                def plain(
                    x: Tensor = x, weights: list[Tensor] = weights, odd: Any = odd, rest: Tensor = rest
                ) -> list[Tensor]:
                    return [F.linear(x, w, one.bias) + rest for w, one in zip(weights, odd, strict=True)]

                calls = {
                    "even": lambda x=x, even=even, stream=stream: [one(x) + stream for one in even],
                    "plain": plain,
                    "padded": lambda x=x, odd=odd, rest=rest: [one(x) + rest for one in odd],
                }
                steps = {name: Step(call) for name, call in calls.items()}
                quickest = min(warm_up(step, cpu) for step in steps.values())
                times, _ = interleave(steps, cpu, seconds, quickest)
                ratios = {
                    name: spread([a / b for a, b in zip(times["even"], times[name], strict=True)]).median
                    for name in ("plain", "padded")
                }
                yield kind, width, rows, 1e3 * spread(times["even"]).median / count, ratios


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = ["| map | d | rows | d results | d − 1, plain | d − 1, padded |", "| --- | --- | --- | --- | --- | --- |"]
    padding.PADDED_FROM = (1, 1)
    with torch.no_grad():
        for kind, width, rows, own, ratios in cells(options.seconds):
            shown = f"{own:.3g} ms | {ratios['plain']:.3f} × | {ratios['padded']:.3f} ×"
            lines.append(f"| {kind} | {width} | {rows} | {shown} |")
            print(lines[-1], flush=True)
    if options.write:
        about = machine(torch.device("cpu"))
        text = [
            "## Odd widths: what writes into a compressed stream",
            "",
            "Written by `python -m tools.benchmarks.writers --write`. A linear map of 4 d numbers and the addition to "
            "the stream; speeds relative to d results, medians. *plain* has d − 1 results, *padded* computes one more "
            f"and drops it, as converted models do from {PADDED_FROM[0]} rows on, with Conv1D from {PADDED_FROM[1]} on "
            "(timed here whatever the rows). The weights of several maps take turns, so they come from memory. "
            f"{machine_in_words(about)}, float32.",
            "",
            *lines,
            "",
        ]
        write_section(Path(__file__).parents[2] / "docs" / "performance.md", "writers", "\n".join(text), SECTIONS)


if __name__ == "__main__":
    main()
