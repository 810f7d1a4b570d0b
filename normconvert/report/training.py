"""What a person sees of a swap: its stages, its progress, and what the output is worth beside the original."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normconvert.report.loading import show_loading
from normconvert.report.screen import Screen
from normconvert.result import Report
from normconvert.wording.words import human_number, percent

if TYPE_CHECKING:
    from normconvert.tuning.evaluation import Figures
    from normconvert.tuning.result import SwapReport
    from normconvert.tuning.tails import Tail

LINES = 10
"""Lines that a training prints where nothing can be rewritten."""
PAUSE = 0.2
"""Seconds between two looks at a live display."""


def stages_of(screen: Screen, src: str, out: str) -> Callable[[str], None]:
    """A function to be called with each stage's name as it begins."""
    begin = screen.stages(src, out)
    texts = {
        "data": "reading the data",
        "calibrate": "calibrating: one pass over data",
        "train": "training",
        "fuse": "fusing, and comparing with the unfused model",
    }

    def stage(name: str) -> None:
        if name in texts:
            screen.say(texts[name])
        else:
            begin(name)

    return stage


def warn_on(screen: Screen) -> Callable[[str], None]:
    """Prints a sentence that stays on the screen."""

    def warn(text: str) -> None:
        screen.clear()
        if not screen.quiet:
            screen.err.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)

    return warn


def watch_on(screen: Screen) -> Callable[[int, int, Mapping[str, float]], None]:
    """Shows loss, λ and the agreement with the original: live in a terminal, else as a few lines."""
    last = [0.0]

    def watch(step: int, steps: int, shown: Mapping[str, float]) -> None:
        text = (
            f"step {step}/{steps}  loss {shown['loss']:.4f}  agreement {shown['agreement']:.1%}  λ {shown['mix']:.2f}"
        )
        if screen.live:
            if time.monotonic() - last[0] > PAUSE:
                last[0] = time.monotonic()
                screen.update(f"training: {text}")
        # The last step always: it is what one looks for in a log.
        elif not screen.quiet and (step % max(1, steps // LINES) == 0 or step == steps):
            screen.err.print(f"  {text}", style="dim", soft_wrap=True)

    return watch


def show_swap(console: Console, report: SwapReport) -> None:
    """The result of a swap."""
    from normconvert.tuning.settings import SWAPS

    console.print(
        Text.assemble((report.source, "bold"), " → ", (str(report.out), "bold"), f"  {SWAPS[report.method]}"),
        soft_wrap=True,
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=12)
    grid.add_column()
    left = len(report.left)
    grid.add_row("norms", f"{len(report.swapped)} swapped, {left} left to run")
    if report.settings.linear:
        grid.add_row("attention", f"{len(report.attention)} swapped, {len(report.attention_left)} left to run")
    for path, reason in report.attention_left.items():
        grid.add_row("", f"`{path}`: {reason}")
    grid.add_row("learnt from", f"{report.settings.data}, {report.steps} steps")
    grid.add_row("measured on", report.eval_data)
    if report.fused is not None:
        error, limit = report.fused.algebra, report.fused.tolerance
        grid.add_row("fused", f"{error:.2g} from the unfused in float64 (at most {limit:.2g})")
    grid.add_row("seconds", " · ".join(f"{stage} {s:.1f}" for stage, s in report.seconds.items()))
    for note in report.notes:
        grid.add_row("note", note)
    console.print(grid)
    console.print(figures_table(report.figures))
    if report.tails:
        console.print(tails_table(report.tails))
    if report.out is not None:
        plan = report.plan
        show_loading(console, Report(report.source, report.library, report.architecture, plan.method, report.out, plan))


def figures_table(figures: Mapping[str, Figures]) -> Table:
    """One row for each stage of a swap."""
    rows = list(figures.values())
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    measures: list[tuple[str, Callable[[Figures], str]]] = [("agreement", lambda f: percent(f.agreement))]
    if any(f.accuracy is not None for f in rows):
        measures.append(("accuracy", lambda f: percent(f.accuracy or 0.0)))
    if any(f.perplexity is not None for f in rows):
        measures.append(("perplexity", lambda f: human_number(f.perplexity)))
    if any(f.kl is not None for f in rows):
        measures.append(("KL", lambda f: human_number(f.kl)))
    measures.append(("worst feature error", lambda f: human_number(max(f.features.values(), default=0.0))))
    for name, _ in measures:
        table.add_column(name, justify="right")
    for stage, one in figures.items():
        table.add_row(stage, *[tell(one) for _, tell in measures])
    return table


def tails_table(tails: Sequence[Tail]) -> Table:
    """One row for each set of data: the original's worst losses and those that they have become."""
    from normconvert.tuning.tails import SHARES

    table = Table(box=None, padding=(0, 1), title="losses, original → swapped", title_justify="left")
    table.add_column(" or ".join(dict.fromkeys(tail.unit for tail in tails)), no_wrap=True)
    for share in SHARES:
        table.add_column(share, justify="right", no_wrap=True)
    for tail in tails:
        table.add_row(tail.data, *(f"{tail.original[s]:.3g} → {tail.swapped[s]:.3g}" for s in SHARES))
    return table
