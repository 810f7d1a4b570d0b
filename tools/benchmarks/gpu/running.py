"""Task after task until the time is up; a failure is a row, and the rest goes on."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from normconvert.errors import in_one_line
from tools.benchmarks.gpu.groups import GROUPS
from tools.benchmarks.gpu.rows import FAILED, OK, SKIPPED, Results, Row, unmeasured
from tools.benchmarks.gpu.tasks import Setting, Task


class TimeUp(BaseException):
    """The time is up in the middle of a row; not an Exception, since measuring catches those."""


def run(
    tasks: Sequence[tuple[Task, float]],
    setting: Setting,
    results: Results,
    end: float,
    say: Callable[[str], object] = print,
) -> None:
    """Do the tasks in order, adding a row to the results after each.

    Args:
        tasks: each with its estimated seconds.
        setting: of the run.
        results: get the rows.
        end: of ``time.monotonic()``, when no row is begun any more, and one that has begun is given up.
        say: gets a line for each row.
    """
    held = _Held()
    for task, estimate in tasks:
        start = time.monotonic()
        if start >= end:
            row = unmeasured(task, SKIPPED, "the time was up")
        elif task.mode == "graphs" and setting.device.type != "cuda":
            row = unmeasured(task, SKIPPED, f"graphs are CUDA's, and the device is {setting.device}")
        else:
            row = _one(held, task, setting, end)
        results.add(row)
        took = time.monotonic() - start
        say(f"{took:6.1f} s (estimated {estimate:.0f})  {task.group}: {task.name}: {in_words(row)}")
    held.release()


def in_words(row: Row) -> str:
    """One line."""
    if row.status != OK:
        return f"{row.status}: {row.reason}"
    times = [f"{name} {spread.median:.4g} ms" for name, spread in row.milliseconds.items()]
    figures = [f"{name} {value:.2g}" for name, value in row.figures.items()]
    failures = [f"{name}: {reason}" for name, reason in row.failures.items()]
    return ", ".join([*times, *figures, *failures])


class _Held:
    """What was built for the last subject, or why it could not be: it is not tried again for each of its tasks."""

    def __init__(self) -> None:
        self.key: tuple[str, str, str] | None = None
        self.built: Any = None
        self.failure = ""

    def get(self, task: Task, setting: Setting) -> Any:
        if task.key != self.key:
            self.release()
            self.key = task.key
            try:
                self.built = GROUPS[task.group].build(task, setting)
            except Exception as error:
                self.failure = in_one_line(error)
        if self.failure:
            raise RuntimeError(f"could not be built: {self.failure}")
        return self.built

    def release(self) -> None:
        """Free the memory before something else is built."""
        self.key, self.built, self.failure = None, None, ""
        _free()


def _one(held: _Held, task: Task, setting: Setting, end: float) -> Row:
    """The row of one task, whatever happens."""
    try:
        with _until(end):
            return GROUPS[task.group].measure(held.get(task, setting), task, setting)
    except TimeUp:
        row = unmeasured(task, SKIPPED, "the time was up while it was measured")
    except Exception as error:  # it is a row; the rest goes on
        row = unmeasured(task, FAILED, in_one_line(error))
    _free()  # what the failed row held
    return row


@contextmanager
def _until(end: float) -> Iterator[None]:
    """Raise TimeUp when the time is up, where the system has a timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def give_up(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, end - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _free() -> None:
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
