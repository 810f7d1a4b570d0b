"""A batch on the screen: the plan of a dry run, the jobs while they run, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normconvert.recipes.batch import Batch, Entry, Listener
from normconvert.recipes.expansion import shown
from normconvert.report.console import BAD, FAINT, GOOD, HEAD, NO, YES
from normconvert.wording.words import human_bytes, percent

if TYPE_CHECKING:
    from normconvert.recipes.job import Event
    from normconvert.report.screen import Screen

MARKS = {"converted": (YES, GOOD), "skipped": ("=", FAINT), "failed": (NO, BAD), "interrupted": ("-", "yellow")}
STAGES = {
    "start": "starting", "open": "opening", "trace": "tracing", "measure": "measuring", "write": "writing",
    "verify": "verifying", "copy": "copying", "upload": "uploading",
}  # fmt: skip
WORDS = {"convert": "convert", "redo": "convert again", "skip": "", "refuse": "refuse", "upload": "upload"}
WIDE = 1000
RECENT = 5
"""Finished jobs that stay on the live screen."""


def show_plan(console: Console, batch: Batch) -> None:
    """What a dry run has to say: every job, what would be done, and how large it is."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style=HEAD)
    for name, justify in (
        ("job", "left"),
        ("what", "left"),
        ("size", "right"),
        ("memory", "right"),
        ("output", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for entry in batch.entries:
        decision, job = entry.decision, entry.job
        what = Text(WORDS[decision.action], BAD if decision.action == "refuse" else "")
        if decision.why:
            what.append(f"{': ' if what else ''}{decision.why}", FAINT)
        memory = f"{job.resources.memory / 1e9:.1f} GB" if job.resources.memory else "?"
        size = human_bytes(job.size) if job.size is not None else "?"
        table.add_row(job.label, what, size, memory, shown(job.output))
    _print(console, table)
    todo = [entry for entry in batch.entries if entry.decision.action in ("convert", "redo")]
    total = human_bytes(sum(entry.job.size or 0 for entry in todo))
    console.print(f"{_jobs(len(batch.entries))}: {len(todo)} to be converted ({total}); dry run, nothing was written")


def show_batch(console: Console, batch: Batch) -> None:
    """What became of the jobs: one line each, the reasons of those that failed, and a last line that sums up."""
    done = [e for e in batch.entries if e.result is not None and e.result.status == "converted"]
    if done or batch.count("failed"):
        _print(console, _results(batch))
    for entry in batch.entries:
        if entry.result is not None and entry.result.status == "failed":
            console.print(
                Text.assemble((f"{NO} ", BAD), (entry.job.label, HEAD), f"  {entry.job.where}"), soft_wrap=True
            )
            for line in entry.result.message.splitlines():
                console.print(Text(f"    {line}"), soft_wrap=True)  # whole, since it may hold a path to be copied
    console.print(Text(summary(batch), HEAD))


def _print(console: Console, table: Table) -> None:
    """A table as wide as a terminal is, and as wide as it has to be where nobody folds lines."""
    width = console.width
    if not console.is_terminal:
        # A pipe has no width: what reads it wants one line a job.
        console.width = max(width, console.measure(table, options=console.options.update(width=WIDE)).maximum)
    console.print(table)
    console.width = width


def summary(batch: Batch) -> str:
    """One line: how many jobs ended how."""
    total = len(batch.entries)
    if batch.count("skipped") == total:
        return f"{_jobs(total)}: nothing to do, every output is up to date"
    words = {"converted": "converted", "skipped": "up to date", "failed": "failed", "interrupted": "interrupted"}
    parts = [f"{batch.count(status)} {word}" for status, word in words.items() if batch.count(status)]
    return f"{_jobs(total)}: {', '.join(parts)} in {_duration(batch.seconds)}"


def _jobs(count: int) -> str:
    return f"{count} job{'' if count == 1 else 's'}"


def _results(batch: Batch) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style=HEAD)
    for name in ("", "job", "norms", "algebra", "rounding", "top-1", "time"):
        table.add_column(name, justify="left" if name in ("", "job") else "right", overflow="fold")
    for entry in batch.entries:
        if entry.result is not None:
            table.add_row(*_cells(entry))
    return table


def _cells(entry: Entry) -> list[Text | str]:
    result = entry.result
    assert result is not None
    mark, style = MARKS[result.status]
    figures = result.figures
    rounding, top1 = figures.get("rounding"), figures.get("top1")
    again = f" (attempt {result.attempts})" if result.attempts > 1 else ""
    return [
        Text(mark, style),
        Text(entry.job.label + again, FAINT if result.status == "skipped" else ""),
        f"{result.norms[0]} of {result.norms[1]}" if result.norms else "",
        f"{figures['algebra']:.1e}" if isinstance(figures.get("algebra"), float) else "",
        f"{rounding:.3g} ×" if isinstance(rounding, float) else "",
        percent(top1) if isinstance(top1, float) else "",
        "up to date" if result.status == "skipped" else _duration(result.seconds),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


@contextmanager
def watching(screen: Screen) -> Iterator[Listener]:
    """A listener that keeps the screen up to date: a table in a terminal, lines elsewhere, nothing when quiet."""
    if screen.quiet:
        yield lambda batch, event: None
    elif not screen.live:
        yield lambda batch, event: _line(screen, batch, event)
    else:
        from rich.live import Live

        view = _View()
        with Live(get_renderable=lambda: view, console=screen.err, transient=True, refresh_per_second=5) as live:

            def listen(batch: Batch, event: Event) -> None:
                view.batch = batch
                if event.kind == "end" and batch.entries[event.job] not in view.recent:
                    view.recent.append(batch.entries[event.job])
                if event.kind == "log" and screen.verbose:
                    live.console.print(Text(f"{batch.entries[event.job].job.label}: {event.data['text']}", FAINT))

            yield listen


def _line(screen: Screen, batch: Batch, event: Event) -> None:
    entry = batch.entries[event.job]
    total = len(batch.entries)
    head = f"[{sum(e.result is not None for e in batch.entries)}/{total}] {entry.job.label}"
    if event.kind == "start":
        screen.say(f"{head}: {entry.place}", spin=False)
    elif event.kind == "retry":
        screen.say(f"{head}: again, since {event.data['why']}", spin=False)
    elif event.kind == "log" and screen.verbose:
        screen.say(f"{head}: {event.data['text']}", spin=False)
    elif event.kind == "end" and entry.result is not None and entry.result.status != "skipped":
        first = entry.result.message.splitlines()[0] if entry.result.message else ""
        what = f"{entry.result.status}{f': {first}' if first else ''}"
        screen.say(f"{head}: {what} in {_duration(entry.result.seconds)}", spin=False)


class _View:
    """What the live display draws."""

    def __init__(self) -> None:
        self.batch = Batch([])
        self.recent: list[Entry] = []

    def __rich__(self) -> Group:
        batch = self.batch
        grid = Table.grid(padding=(0, 2))
        for entry in self.recent[-RECENT:]:
            result = entry.result
            if result is not None and result.status != "skipped":
                mark, style = MARKS[result.status]
                words = (
                    f"{result.norms[0]} of {result.norms[1]} norms" if result.norms else result.message.split("\n")[0]
                )
                grid.add_row(Text(mark, style), entry.job.label, _short(words), "", _duration(result.seconds))
        running = [entry for entry in batch.entries if entry.running]
        for entry in running:
            bar = ProgressBar(100, round(100 * entry.done), width=12) if entry.stage == "write" else ""
            spent = time.monotonic() - entry.started
            doing = STAGES.get(entry.stage, entry.stage)
            grid.add_row(Text("…", "cyan"), entry.job.label, doing, bar, _duration(spent))
        ended = sum(entry.result is not None for entry in batch.entries)
        left = f"{ended} of {_jobs(len(batch.entries))} done, {len(running)} running"
        failed = batch.count("failed")
        return Group(grid, Text(f"{left}, {failed} failed" if failed else left, FAINT))


def _short(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
