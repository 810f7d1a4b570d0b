"""Rows, and the file that holds them: written anew after each row, so that a run that is killed keeps what it has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normconvert.benchmark import result
from normconvert.benchmark.result import ORIGINAL
from normconvert.benchmark.timing import Spread
from tools.benchmarks.gpu.tasks import Task

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Row:
    """What became of one task.

    Attributes:
        group: of the task.
        name: unique within the group.
        settings: what was measured, as data.
        status: ``ok``, ``failed`` or ``skipped``.
        reason: one line, unless it is ok.
        milliseconds: version -> time of a call, median and quartiles.
        speedup: version -> the original's time divided by its own, round by round.
        peak_bytes: version -> memory that a call takes beyond the parameters; None where it was not measured.
        figures: other numbers, by what they are.
        failures: version -> why it could not be measured beside the others.
        rounds: how many samples.
        calls: of how many calls each sample is the mean.
    """

    group: str
    name: str
    settings: dict[str, Any]
    status: str
    reason: str = ""
    milliseconds: dict[str, Spread] = field(default_factory=dict)
    speedup: dict[str, Spread] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    calls: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of :meth:`to_json`."""
        spreads = {
            key: {name: Spread(**value) for name, value in data[key].items()} for key in ("milliseconds", "speedup")
        }
        return cls(**{**data, **spreads})


def measured(task: Task, found: result.Row, scale: float = 1.0) -> Row:
    """The row of a task that :func:`normconvert.benchmark.compare.compare` has measured.

    Args:
        task: what it was.
        found: failed if the original could not be measured.
        scale: what the times are multiplied by.
    """
    if ORIGINAL not in found.milliseconds:
        return unmeasured(task, FAILED, next(iter(found.failures.values()), "the original was not measured"))
    return Row(
        task.group, task.name, task.settings, OK,
        milliseconds={
            name: Spread(scale * s.median, scale * s.low, scale * s.high) for name, s in found.milliseconds.items()
        },
        speedup=found.speedup, peak_bytes=found.peak_bytes, failures=found.failures, rounds=found.rounds,
        calls=found.calls,
    )  # fmt: skip


def unmeasured(task: Task, status: str, reason: str) -> Row:
    """The row of a task that failed or was skipped."""
    return Row(task.group, task.name, task.settings, status, reason)


class Results:
    """The rows of a run, and where they are kept.

    Args:
        path: of the JSON; None keeps them in memory only. Rows that another run on the same machine, with the same
            versions, has left there stay until they are measured again.
        about: machine, versions, command: what the pages say beside the rows.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)
        self.rows: dict[tuple[str, str], Row] = {}
        self.commands: list[str] = []
        if path is not None and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if all(earlier.get(key) == value for key, value in self.about.items() if key != "command"):
                self.rows = {(r["group"], r["name"]): Row.from_json(r) for r in earlier["rows"]}
                self.commands = [c for c in earlier["commands"] if c != self.about["command"]]

    def add(self, row: Row) -> None:
        """Keep one row; an earlier measurement gives way to a new one, not to a row that was not measured."""
        earlier = self.rows.get((row.group, row.name))
        if row.status == SKIPPED and earlier is not None and earlier.status == OK:
            return
        self.rows[row.group, row.name] = row
        if self.path is not None:
            write(self.path, self.document())

    def document(self) -> dict[str, Any]:
        """As JSON-ready data."""
        about = {key: value for key, value in self.about.items() if key != "command"}
        commands = [*self.commands, self.about["command"]]
        return {**about, "commands": commands, "rows": [row.to_json() for row in self.rows.values()]}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write the file whole or not at all: whoever looks at it, at any moment, finds complete JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
