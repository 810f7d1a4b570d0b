"""What is to be measured: rows as data, in groups, with the seconds that each is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tools.benchmarks.gpu.rows import Row

START = 20.0
"""Estimated seconds until the first row: imports, and the first use of a GPU."""


@dataclass(frozen=True)
class Setting:
    """What holds for all rows of a run.

    Attributes:
        device: where it runs.
        small: toys instead of models: every code path, no figures worth keeping.
        seconds: of interleaved calls in a row, after the warm-up; five rounds at least.
    """

    device: torch.device
    small: bool
    seconds: float


@dataclass(frozen=True)
class Task:
    """A row to be.

    Attributes:
        group: one of the table of groups.
        subject: what is built for it; tasks of one subject and dtype that follow each other share what was built.
        kind: ``forward``, ``decode``, or what the group calls its workloads.
        batch: rows; 0 where there are none to choose.
        length: tokens in a row; None where there is no text.
        mode: one of :data:`normconvert.benchmark.steps.MODES`.
        dtype: of parameters and inputs.
        layout: ``channels-last``, or nothing.
        seconds: estimated on a data-centre GPU, what is built for the subject aside.
    """

    group: str
    subject: str
    kind: str = "forward"
    batch: int = 1
    length: int | None = None
    mode: str = "eager"
    dtype: str = "bfloat16"
    layout: str = ""
    seconds: float = 2.0

    @property
    def name(self) -> str:
        """Unique within the group: ``gpt2 bfloat16 decode 8 × 128 graphs``."""
        size = " × ".join(str(number) for number in (self.batch, self.length) if number)
        mode = self.mode if self.batch else ""
        return " ".join(filter(None, (self.subject, self.dtype, self.kind, size, self.layout, mode)))

    @property
    def settings(self) -> dict[str, Any]:
        """All but the group and the estimate."""
        return {key: value for key, value in asdict(self).items() if key not in ("group", "seconds")}

    @property
    def key(self) -> tuple[str, str, str]:
        """What tasks that share what was built for them have in common."""
        return self.group, self.subject, self.dtype


@dataclass(frozen=True)
class Group:
    """Tasks of one kind, and how they are done.

    Attributes:
        title: for the pages.
        tasks: (small) -> those of the first eight minutes, and those that come after all groups' first ones.
        build: what the tasks of a subject share.
        measure: a row, from what was built.
        set_up: subject -> estimated seconds that building it takes.
    """

    title: str
    tasks: Callable[[bool], tuple[list[Task], list[Task]]]
    build: Callable[[Task, Setting], Any]
    measure: Callable[[Any, Task, Setting], Row]
    set_up: Callable[[str], float]


def ordered(groups: Iterable[Group], small: bool) -> list[Task]:
    """All tasks in the order of their priority: every group's first ones, then what is left of each."""
    first: list[Task] = []
    rest: list[Task] = []
    for group in groups:
        one, other = group.tasks(small)
        first += one
        rest += other
    return first + rest


def estimated(tasks: Sequence[Task], set_up: Callable[[Task], float]) -> Iterator[tuple[Task, float]]:
    """Each task with its estimated seconds, in which the first of a subject counts what is built for it."""
    before = None
    for task in tasks:
        yield task, task.seconds + (set_up(task) if task.key != before else 0.0)
        before = task.key


def that_fit(tasks: Sequence[Task], set_up: Callable[[Task], float], seconds: float) -> list[tuple[Task, float]]:
    """The tasks up to the first that would, by the estimates, end after ``seconds``."""
    chosen = []
    end = START
    for task, own in estimated(tasks, set_up):
        end += own
        if end > seconds:
            break
        chosen.append((task, own))
    return chosen
