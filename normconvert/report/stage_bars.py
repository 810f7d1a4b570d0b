"""The live display of a command in a terminal: a bar for each stage, and how long the rest may take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from normconvert.wording.printable import printable
from normconvert.wording.steps import Step
from normconvert.wording.words import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

USUAL: Mapping[str, float] = {"open": 0.45, "trace": 0.2, "write": 0.05, "verify": 0.3}
"""Stage -> its usual part of a conversion's time; only for the estimate of what is left."""


class StageBars:
    """A line a stage: what it does, its bar, the step that runs, the time so far and, on the last, what may be left.

    Args:
        console: of the terminal; everything vanishes with :meth:`stop`.
        stages: those that will come, for the estimate.
    """

    def __init__(self, console: Console, stages: tuple[str, ...]) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        cut = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            SpinnerColumn(style="cyan", finished_text="✓"),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=28)),
            BarColumn(bar_width=10),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[now]}", markup=False, style="dim", table_column=cut),
            console=console,
            transient=True,
        )
        self._stages = stages
        self._start = time.monotonic()
        self._begun = self._start
        self._stage = ""
        self._task: Any = None
        self._progress.start()

    def begin(self, stage: str, text: str) -> None:
        """A stage begins, and the one before it is done."""
        self._finish()
        self._stage, self._begun = stage, time.monotonic()
        self._task = self._progress.add_task(printable(text), total=None, now="", left="")
        self._estimate(0.0)

    def step(self, step: Step) -> None:
        """A step of the stage begins."""
        total = step.total or None
        self._progress.update(self._task, completed=step.done, total=total, now=printable(step))
        self._estimate(step.done / total if total else 0.0)

    def written(self, name: str, done: int, total: int) -> None:
        """One more tensor is written, of ``total`` bytes in all."""
        rate = done / max(time.monotonic() - self._begun, 1e-3)
        now = f"{human_bytes(int(rate))}/s  {human_bytes(done)} of {human_bytes(total)}  {printable(name)}"
        self._progress.update(self._task, completed=done, total=total, now=now)
        self._estimate(done / total if total else 1.0)

    def stop(self) -> None:
        """Take everything off the screen."""
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[-1]
            total = task.total or 1
            self._progress.update(self._task, completed=total, total=total, now="", left="")

    def _estimate(self, part: float) -> None:
        """Say what may be left, ``part`` of this stage being done, by the usual parts of the stages."""
        if self._stage not in self._stages:
            return
        before = self._stages[: self._stages.index(self._stage)]
        whole = sum(USUAL[stage] for stage in self._stages)
        done = (sum(USUAL[stage] for stage in before) + part * USUAL[self._stage]) / whole
        if 0 < done < 1:
            left = (time.monotonic() - self._start) * (1 - done) / done
            self._progress.update(self._task, left=f"~{max(1, round(left))} s left")
