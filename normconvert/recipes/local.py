"""Jobs on this machine: a few processes, each with its share of the threads, never more at once than memory allows."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normconvert.files.child_interpreter import child_interpreter
from normconvert.recipes import machine
from normconvert.recipes.claim import discard
from normconvert.recipes.job import Event, Job, Result
from normconvert.recipes.storage import is_url

LARGE = 4_000_000_000
"""A job of this many bytes is a process's last one, so that all its memory comes back."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LAST_WORDS = 5
"""Lines of a process's standard error that are kept, for when it dies."""


def execute(jobs: Mapping[int, Job], workers: int = 1, budget: int | None = None) -> Iterator[Event]:
    """Run jobs in processes and tell what happens.

    Args:
        jobs: index in the batch -> job.
        workers: how many at once, at most.
        budget: bytes that all jobs together may be expected to take; None: what is free now.

    Yields:
        Events; an ``end`` for every job. A job whose own estimate is over the budget is not started and fails.
    """
    limit = machine.memory() if budget is None else budget
    waiting = dict(jobs)
    for index, job in jobs.items():
        # It would never fit, and the batch would wait for it for ever.
        if job.resources.memory > limit:
            yield _end(index, Result("failed", 2, too_large(job, limit), "InputError", attempts=0))
            del waiting[index]
    pool = _Pool(min(workers, max(len(waiting), 1)), machine.cores())
    try:
        yield from _schedule(pool, waiting, workers, limit)
    finally:
        # First the processes, then what they left: their claims end with them.
        pool.close()
        for index in pool.running.values():
            if not is_url(jobs[index].output):
                discard(Path(jobs[index].output))


def too_large(job: Job, limit: int) -> str:
    """Why a job is not even tried."""
    return (
        f"needs about {job.resources.memory / 1e9:.1f} GB of memory and {limit / 1e9:.1f} GB may be used: use a larger "
        "machine, set verify: false, or set resources: {memory: SIZE} or --memory if you know better"
    )


def _schedule(pool: _Pool, waiting: dict[int, Job], workers: int, limit: int) -> Iterator[Event]:
    running: dict[int, Job] = {}
    while waiting or running:
        # Again after each end: what did not fit beside the one that has gone may fit now.
        while len(running) < workers:
            index = choose(waiting, running.values(), limit, in_order=workers == 1)
            if index is None:
                break
            running[index] = waiting.pop(index)
            yield Event(index, "start", {"place": pool.start(index, running[index])})
        event = pool.next()
        if event.kind == "end":
            del running[event.job]
        yield event


def choose(waiting: Mapping[int, Job], running: Any, limit: int, *, in_order: bool) -> int | None:
    """The next job to start: of those that fit into what is left of the memory the largest, or the first.

    The large ones first keep all processes busy until near the end; one that does not fit beside those that run waits
    until it does.

    Args:
        waiting: index -> job.
        running: the jobs that run now.
        limit: bytes for all.
        in_order: the first of the recipe instead.
    """
    left = limit - sum(job.resources.memory for job in running)
    fitting = [index for index, job in waiting.items() if job.resources.memory <= left]
    if not fitting:
        return None
    # Of equal ones the first, so that a run can be followed.
    return fitting[0] if in_order else max(fitting, key=lambda index: (waiting[index].resources.memory, -index))


def _end(index: int, result: Result) -> Event:
    return Event(index, "end", {"result": result.to_json()})


@dataclass(eq=False)
class _Worker:
    """A process, the job it has, and the last it said on standard error."""

    process: subprocess.Popen[bytes]
    job: int | None = None
    retire: bool = False
    words: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))


class _Pool:
    """Processes that come when there is work for them and go when it is done."""

    def __init__(self, size: int, cores: int) -> None:
        self.running: dict[_Worker, int] = {}
        self._idle: list[_Worker] = []
        self._said: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._environment = {**os.environ, **thread_share(cores, size)}

    def start(self, index: int, job: Job) -> str:
        """Give a job to a process; returns what to call that."""
        # One that is there has the libraries imported.
        worker = self._idle.pop() if self._idle else self._spawn()
        worker.job, worker.retire = index, job.resources.memory >= LARGE
        self.running[worker] = index
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:  # it has just died: its end is on the way
            pass
        return f"process {worker.process.pid}"

    def next(self) -> Event:
        """The next thing to tell; waits for it."""
        while True:
            worker, said = self._said.get()
            index = worker.job
            # The end of its output: it is dead or has been dismissed.
            if said is None:
                if worker in self._idle:
                    self._idle.remove(worker)
                if index is not None:
                    return self._lost(worker, index)
            elif index is not None and said["kind"] == "end":
                worker.job = None
                del self.running[worker]
                if worker.retire:
                    self._dismiss(worker)
                else:
                    self._idle.append(worker)
                return Event(index, "end", said["data"])
            elif index is not None and said["kind"] != "ready":
                return Event(index, said["kind"], said["data"])

    def close(self) -> None:
        """End all processes; those that still have a job stay in ``running``, to be cleared up after."""
        for worker in (*self._idle, *self.running):
            self._dismiss(worker)
        for worker in (*self._idle, *self.running):
            worker.process.wait()

    def _spawn(self) -> _Worker:
        process = subprocess.Popen(
            child_interpreter("from normconvert.recipes.worker import main; main()"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the others
        )  # fmt: skip
        worker = _Worker(process)
        for target in (self._listen, self._overhear):
            threading.Thread(target=target, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        try:
            for line in worker.process.stdout:
                with suppress(ValueError):  # a process that was killed may leave half a line
                    said = json.loads(line)
                    if isinstance(said, dict) and {"kind", "data"} <= set(said):
                        self._said.put((worker, said))
        finally:
            # In any case, and the last: it is what next() knows a death by.
            self._said.put((worker, None))

    def _overhear(self, worker: _Worker) -> None:
        assert worker.process.stderr is not None
        for line in worker.process.stderr:
            text = line.decode(errors="replace").rstrip()
            if text:
                worker.words.append(text)
                if worker.job is not None:
                    self._said.put((worker, {"kind": "log", "data": {"text": text}}))

    def _lost(self, worker: _Worker, index: int) -> Event:
        # It has closed its output, so this does not take long.
        status = worker.process.wait()
        worker.job = None
        del self.running[worker]
        how = f"exit status {status}"
        if status < 0:
            how = f"signal {-status} ({signal.Signals(-status).name})"
        hint = "; the system may have run out of memory" if status == -signal.SIGKILL else ""
        last = f"; its last words: {worker.words[-1]}" if worker.words else ""
        place = f"process {worker.process.pid}"
        message = f"its process ended with {how}{hint}{last}"
        return _end(index, Result("failed", 2, message, "ProcessDied", place=place))

    def _dismiss(self, worker: _Worker) -> None:
        worker.process.kill()  # an idle one has nothing to lose, and the libraries take seconds to say good-bye


def thread_share(cores: int, workers: int) -> dict[str, str]:
    """The environment that gives each of ``workers`` processes its share of the threads; a smaller wish is kept."""
    # Each would take all cores for itself, and they would wait for each other.
    share = max(1, cores // max(workers, 1))
    return {
        name: str(min(share, int(wish)) if (wish := os.environ.get(name, "")).isdecimal() and int(wish) > 0 else share)
        for name in THREADS
    }
