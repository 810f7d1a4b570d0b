"""A batch from its recipes to its summary: plan it, look what is there already, run the rest."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.recipes.expansion import expand, shown, with_run
from normconvert.recipes.job import Event, Job, Result, worst
from normconvert.recipes.state import Decision, decide
from normconvert.recipes.storage import Store, is_url

Listener = Callable[["Batch", Event], None]
"""Called with the batch and each event, in the order they happen."""


@dataclass
class Entry:
    """A job of a batch and what became of it.

    Attributes:
        job: what is asked for.
        decision: what is to be done, as it was when the batch was planned.
        result: how it ended; None while it has not.
        stage: what it is doing now; empty while it is not running.
        done: share of the bytes written, 0 to 1.
        place: what runs it.
        started: ``time.monotonic`` at its last start.
        attempts: how often it was started.
    """

    job: Job
    decision: Decision
    result: Result | None = None
    stage: str = ""
    done: float = 0.0
    place: str = ""
    started: float = 0.0
    attempts: int = 0

    @property
    def running(self) -> bool:
        """Whether something works on it now."""
        return self.result is None and bool(self.stage)

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON-ready data."""
        job = self.job
        return {
            "name": job.name,
            "source": job.source,
            "revision": job.revision,
            "variant": job.variant,
            "method": job.method,
            "output": shown(job.output),
            "recipe": job.where,
            "size": job.size,
            "memory": job.resources.memory,
            "action": self.decision.action,
            "why": self.decision.why,
            "result": self.result.to_json() if self.result is not None else None,
        }


@dataclass
class Batch:
    """The jobs of a run, and how far they are.

    Attributes:
        entries: in the order of the recipes.
        seconds: what the run took.
        interrupted: the exit status of what ended it from outside: 130 for Ctrl-C, 143 for SIGTERM; else 0.
        logs: what the libraries said: index of the job, line.
    """

    entries: list[Entry]
    seconds: float = 0.0
    interrupted: int = 0
    logs: list[tuple[int, str]] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """The worst of its jobs: 1 before 2 before 3 before 0; that of the interruption if there was one."""
        return self.interrupted or worst([e.result.exit_status for e in self.entries if e.result is not None])

    def count(self, status: str) -> int:
        """How many jobs ended so."""
        return sum(entry.result is not None and entry.result.status == status for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """The batch as JSON-ready data."""
        statuses = ("converted", "skipped", "failed", "interrupted")
        return {
            "jobs": [entry.to_json() for entry in self.entries],
            "counts": {status: self.count(status) for status in statuses},
            "seconds": self.seconds,
        }


def run_recipes(
    recipes: str | Path | Sequence[str | Path],
    *,
    jobs: int = 1,
    ray: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    memory: int | None = None,
    listen: Listener | None = None,
) -> Batch:
    """Run all conversions of one or more recipes; those whose output is there and up to date are skipped.

    Args:
        recipes: YAML files; see docs/recipes.md.
        jobs: how many processes of this machine work at once. Each has its share of the threads, and a job starts only
            when the memory it is expected to take is free.
        ray: run on a Ray cluster instead: its address, or ``auto`` for ``RAY_ADDRESS``, a cluster of this machine or
            else a new one.
        force: redo what is there already.
        dry_run: plan only; every entry's ``decision`` says what would be done.
        memory: bytes that all jobs of this machine together may take; None: what is free now.
        listen: called with the batch and each event.

    Returns:
        The batch, with a result for every job. A job that fails does not stop the others and raises nothing.

    Raises:
        InputError: a recipe is not one, sources are missing, outputs clash or cannot be written to, or the cluster
            cannot be reached. Nothing has been run then.
    """
    batch = plan_recipes(recipes, force=force)
    if not dry_run:
        run_batch(batch, jobs=jobs, ray=ray, memory=memory, listen=listen)
    return batch


def plan_recipes(recipes: str | Path | Sequence[str | Path], *, force: bool = False) -> Batch:
    """The jobs of recipes, and what is to be done with each; runs nothing.

    Raises:
        InputError: as :func:`run_recipes`.
    """
    from normconvert.recipes.reading import read_recipe, together

    paths = [recipes] if isinstance(recipes, (str, Path)) else list(recipes)
    files, problems = [], []
    # All files are read before one is complained of: whoever mends a recipe wants every error at once.
    for path in paths:
        try:
            files.append(read_recipe(path))
        except InputError as error:
            problems.append(error)
    if problems:
        raise together(problems)
    # Before anything runs: outputs that clash and sources that are missing show only when all jobs are known.
    planned = with_run(expand(files), uuid.uuid4().hex, force)
    return Batch([Entry(job, decide(job)) for job in planned])


def run_batch(
    batch: Batch,
    *,
    jobs: int = 1,
    ray: str | None = None,
    memory: int | None = None,
    listen: Listener | None = None,
) -> None:
    """Run what a batch has to run, filling in its results.

    Raises:
        InputError: as :func:`run_recipes`.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; expected 1 or more")
    start = time.monotonic()
    tell = listen or (lambda batch, event: None)
    todo: dict[int, Job] = {}
    for index, entry in enumerate(batch.entries):
        action, why = entry.decision.action, entry.decision.why
        if action == "refuse":
            entry.result = Result("failed", 2, f"{shown(entry.job.output)}: {why}", "InputError", attempts=0)
        elif action == "skip":
            state = entry.decision.state
            figures, norms = (state.figures, state.norms) if state is not None else ({}, None)
            entry.result = Result("skipped", 0, why, norms=norms, figures=figures, attempts=0)
        else:
            todo[index] = entry.job
            continue
        tell(batch, Event(index, "end", {"result": entry.result.to_json()}))
    made: list[Path] = []
    try:
        if todo:
            # A disk that cannot be written to is to be found now, not at the end of the first conversion.
            made = prepare_outputs(todo.values())
            for event in _events(todo, jobs, ray, memory):
                _note(batch, event)
                tell(batch, event)
    # SIGTERM comes this way as well, with its own status.
    except KeyboardInterrupt as error:
        batch.interrupted = status = getattr(error, "exit_status", 130)
        for entry in batch.entries:
            entry.result = entry.result or Result("interrupted", status, "interrupted", attempts=entry.attempts)
    finally:
        for folder in made:
            with suppress(OSError):  # only if it is still empty
                folder.rmdir()
        batch.seconds = time.monotonic() - start


def _events(todo: dict[int, Job], jobs: int, ray: str | None, memory: int | None) -> Iterator[Event]:
    if ray is not None:
        from normconvert.recipes import ray_executor

        return ray_executor.execute(todo, ray)
    from normconvert.recipes import local

    return local.execute(todo, jobs, memory)


def _note(batch: Batch, event: Event) -> None:
    """Write an event into the entry it is about."""
    entry, data = batch.entries[event.job], event.data
    if event.kind == "start":
        entry.stage, entry.done, entry.place = "start", 0.0, data.get("place", "")
        entry.started, entry.attempts = time.monotonic(), entry.attempts + 1
    elif event.kind == "stage":
        entry.stage, entry.done = data["name"], 0.0
    elif event.kind == "progress":
        entry.done = data["done"] / max(data["total"], 1)
    elif event.kind == "retry":
        entry.stage = ""
    elif event.kind == "log":
        batch.logs.append((event.job, data["text"]))
    elif event.kind == "end":
        entry.stage, entry.result = "", Result.from_json(data["result"])


def prepare_outputs(jobs: Any) -> list[Path]:
    """Make the folders that the outputs will lie in, and see whether they can be written to.

    Returns:
        The folders that were made, innermost first.

    Raises:
        InputError: one line for each output that cannot be written.
    """
    from normconvert.recipes.reading import together

    made: list[Path] = []
    problems: dict[str, InputError] = {}
    for job in jobs:
        try:
            if is_url(job.output):
                Store(job.output)
            else:
                # The newest first, so that what is inside is removed before what is around it.
                made = _prepare(Path(job.output).parent) + made
        except InputError as error:
            # By their text: a hundred jobs of one bad folder are one line.
            problems[str(error)] = InputError(f"{job.where}: the output cannot be written: {error}")
        except OSError as error:
            reason = error.strerror or str(error)
            parent = shown(str(Path(job.output).parent))
            problems[parent] = InputError(f"{job.where}: the output cannot be written: {parent}: {reason}")
    if problems:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise together(list(problems.values()))
    return made


def _prepare(folder: Path) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".normconvert-{os.getpid()}"
    probe.mkdir()  # permission bits say nothing to root, and nothing of a disk that is mounted read-only
    probe.rmdir()
    return missing


__all__ = ["Batch", "Entry", "Event", "Listener", "plan_recipes", "run_batch", "run_recipes"]
