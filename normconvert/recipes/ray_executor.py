"""Jobs on a Ray cluster: the same work as on this machine, with resources for each job, and again if a node dies.

A job is a task without retries of Ray's own: what became of it is seen here, so that a second attempt is told in the
table, and finds out what the first one left (:mod:`normconvert.recipes.claim`, :mod:`normconvert.recipes.state`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normconvert import __version__
from normconvert.errors import InputError, first_line
from normconvert.files.child_interpreter import child_interpreter
from normconvert.recipes.claim import discard
from normconvert.recipes.job import Event, Job, Result
from normconvert.recipes.state import read_state
from normconvert.recipes.storage import is_url

AUTO = "auto"
REACH = 10.0
"""Seconds within which a cluster has to answer."""
ATTEMPTS = 4
"""How often a job is started before its dying workers are taken to be its own fault."""
POLL = 0.2
LOOK = 2.0
"""Seconds between two looks at which nodes are left."""
APPEAR = 10.0
"""Seconds for an output to be seen on a shared disk."""
_PORT = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:]+\]|[^:/\s\[\]]+):(?P<port>\d+)")


def execute(jobs: Mapping[int, Job], address: str = AUTO) -> Iterator[Event]:
    """Run jobs on a cluster and tell what happens.

    Args:
        jobs: index in the batch -> job. Local paths have to be the same on all nodes; normconvert has to be installed
            there.
        address: ``host:port``, ``ray://host:port``, or ``auto``: ``RAY_ADDRESS``, a cluster of this machine, or a new
            one for this batch.

    Yields:
        Events; an ``end`` for every job.

    Raises:
        InputError: Ray is not installed, or no cluster answers at the address within 10 s.
    """
    ray = connect(address)
    try:
        yield from _Cluster(ray, jobs).run()
    finally:
        ray.shutdown()


def connect(address: str) -> Any:
    """The module ``ray``, connected.

    Raises:
        InputError: see :func:`execute`.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray, which is not installed: pip install 'normconvert[ray]' ({error})"
        ) from error
    # Before init(): a cluster that it starts would report its use to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = os.environ.get("RAY_ADDRESS") or AUTO if address == AUTO else address
    options = {"logging_level": logging.ERROR, "log_to_driver": False}
    if named == AUTO:
        try:
            # Tried first: a cluster that runs here already is meant, and a second one would fight it for the cores.
            ray.init(address=AUTO, **options)
        except ConnectionError:
            ray.init(include_dashboard=False, **options)
        return ray
    reach(named)
    try:
        ray.init(address=named, **options)
    except Exception as error:
        raise _unreachable(named, first_line(error)) from error
    return ray


def reach(address: str) -> None:
    """See whether a cluster answers.

    A process of its own tries first: where something else than Ray listens, Ray ends the process that asked.

    Raises:
        InputError: none does within 10 s.
    """
    match = _PORT.fullmatch(address)
    if match is None:
        raise InputError(f"--ray {address}: expected host:port, ray://host:port or {AUTO}")
    until = time.monotonic() + REACH
    try:
        # A closed port is told at once, without a process that imports Ray.
        with socket.create_connection((match["host"].strip("[]"), int(match["port"])), timeout=REACH):
            pass
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(getattr(error, "strerror", None) or error)) from error
    code = (
        "import logging, ray; print('ready', flush=True); "
        "ray.init(address=sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False); print('connected')"
    )
    process = subprocess.Popen(
        child_interpreter(code, address), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # the import is not the cluster's fault
    until = max(until, time.monotonic() + REACH)
    try:
        out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise _unreachable(address, f"no answer within {REACH:.0f} s") from None
    if "connected" not in out:
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        raise _unreachable(address, lines[-1] if lines else f"exit status {process.returncode}")


def _unreachable(address: str, reason: str) -> InputError:
    return InputError(f"--ray {address}: no Ray cluster answers there: {reason}; is one running (ray start --head)?")


@dataclass
class _Attempt:
    """A job that was handed to the cluster."""

    index: int
    job: Job
    number: int
    started: bool = False


class _Cluster:
    """The jobs of a batch, on their way through a cluster."""

    def __init__(self, ray: Any, jobs: Mapping[int, Job]) -> None:
        self._ray, self._jobs = ray, jobs
        self._running: dict[Any, _Attempt] = {}
        self._task = ray.remote(_perform)
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # On the node that the batch is run from: if that goes, so does the batch.
        # Without a core of its own, or it might wait behind the very tasks that are to tell it something.
        self._board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        self._looked = 0.0

    def run(self) -> Iterator[Event]:
        """Everything that happens until all jobs have ended."""
        try:
            for index, job in self._jobs.items():
                yield from self._submit(index, job, 1)
            while self._running:
                ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=POLL)
                # Before the results: what an attempt said is passed on only while it is known.
                yield from self._heard()
                for reference in ready:
                    yield from self._ended(reference)
                yield from self._stranded()
        finally:
            left = list(self._running.items())
            # First all are stopped, then what they left is cleared: a claim is held until its process is gone.
            for reference, _ in left:
                with contextlib.suppress(Exception):  # it may have ended by itself
                    self._ray.cancel(reference, force=True)
            for _, attempt in left:
                if not is_url(attempt.job.output):
                    discard(Path(attempt.job.output))

    def _submit(self, index: int, job: Job, number: int) -> Iterator[Event]:
        needs = job.resources
        # Ray would let it wait for ever.
        if not self._fits(job):
            yield _failed(index, f"no node of the cluster has {_wants(job)}", number - 1)
            return
        task = self._task.options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory, max_retries=0, scheduling_strategy="SPREAD"
        )
        reference = task.remote(self._board, index, job.to_json(), number, __version__)
        self._running[reference] = _Attempt(index, job, number)

    def _heard(self) -> Iterator[Event]:
        """What the tasks said since the last time; nothing of attempts that are over."""
        try:
            said = self._ray.get(self._board.take.remote(), timeout=LOOK)
        except self._ray.exceptions.RayError:  # it was restarted: some words are lost, no result is
            return
        current = {attempt.index: attempt for attempt in self._running.values()}
        for index, number, kind, data in said:
            attempt = current.get(index)
            # A worker that was given up may still speak.
            if attempt is not None and attempt.number == number:
                attempt.started = True
                yield Event(index, kind, data)

    def _ended(self, reference: Any) -> Iterator[Event]:
        attempt = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            result = Result.from_json(self._ray.get(reference))
        # Before RayError, of which it is a kind: an exception of the task comes again with the next attempt.
        except errors.RayTaskError as error:  # outside of the job itself, such as a node without normconvert
            yield _failed(attempt.index, first_line(error.cause or error), attempt.number)
        except errors.RayError as error:
            why = f"{type(error).__name__}: {first_line(error).partition('. ')[0]}"
            if attempt.number >= ATTEMPTS:
                message = f"its worker died {attempt.number} times, the last time with {why}"
                yield _failed(attempt.index, message, attempt.number)
                return
            yield Event(attempt.index, "retry", {"why": why})
            yield from self._submit(attempt.index, attempt.job, attempt.number + 1)
        else:
            yield Event(attempt.index, "end", {"result": self._seen(attempt.job, result).to_json()})

    def _seen(self, job: Job, result: Result) -> Result:
        """A result that can be found from here, too."""
        if result.status != "converted" or is_url(job.output):
            return result
        until = time.monotonic() + APPEAR
        # A shared disk may show a file later than it was written elsewhere.
        while read_state(Path(job.output)) is None:
            if time.monotonic() > until:
                message = (
                    f"{job.output}: written by {result.place}, but not to be seen here: name a shared folder or a URL"
                )
                return Result("failed", 2, message, "InputError", result.seconds, place=result.place)
            time.sleep(POLL)
        return result

    def _stranded(self) -> Iterator[Event]:
        """Give up jobs that wait for a kind of node of which none is left."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        for reference, attempt in list(self._running.items()):
            # One that has started keeps its node, or ends by an error when that goes.
            if not attempt.started and not self._fits(attempt.job):
                self._ray.cancel(reference)
                del self._running[reference]
                message = f"no node is left in the cluster with {_wants(attempt.job)}"
                yield _failed(attempt.index, message, attempt.number - 1)

    def _fits(self, job: Job) -> bool:
        """Whether some node could ever run it."""
        needs = {"CPU": job.resources.cpus, "GPU": job.resources.gpus, "memory": float(job.resources.memory)}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return any(all(node.get(name, 0.0) >= amount for name, amount in needs.items()) for node in nodes)


def _wants(job: Job) -> str:
    needs = job.resources
    gpus = f", {needs.gpus:g} GPUs" if needs.gpus else ""
    return f"{needs.cpus:g} CPUs{gpus} and {needs.memory / 1e9:.1f} GB of memory"


def _failed(index: int, message: str, attempts: int) -> Event:
    return Event(index, "end", {"result": Result("failed", 2, message, "InputError", attempts=attempts).to_json()})


class _Board:
    """An actor that the tasks tell their progress."""

    def __init__(self) -> None:
        self._said: list[tuple[int, int, str, dict[str, Any]]] = []

    def put(self, index: int, attempt: int, kind: str, data: dict[str, Any]) -> None:
        """Add an event."""
        self._said.append((index, attempt, kind, data))

    def take(self) -> list[tuple[int, int, str, dict[str, Any]]]:
        """All events since the last time."""
        said, self._said = self._said, []
        return said


def _perform(board: Any, index: int, job: dict[str, Any], number: int, version: str) -> dict[str, Any]:
    """A job on a node."""
    import ray

    node = f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"
    place = f"node {node}"
    # Before anything of it is imported: what another version does is not what was planned.
    if version != __version__:
        message = f"{node} has normconvert {__version__}, the batch is run by {version}: install the same version"
        return Result("failed", 2, message, "InputError", place=place, attempts=number).to_json()
    from normconvert.recipes.work import perform
    from normconvert.recipes.worker import hush

    def say(kind: str, data: dict[str, Any]) -> None:
        board.put.remote(index, number, kind, data)

    say("start", {"place": place})
    hush()
    done = Job.from_json(job)
    import torch

    # Ray counts cores and does not hold anyone to them.
    torch.set_num_threads(max(1, int(done.resources.cpus)))
    words = _Lines(lambda text: say("log", {"text": text}))
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        return perform(done, say, place, number).to_json()


class _Lines(io.TextIOBase):
    """A text stream that passes whole lines on."""

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line, self._rest, self._lock = line, "", threading.Lock()

    def write(self, text: str) -> int:
        """Pass on the lines that are complete now."""
        with self._lock:
            # Libraries print in pieces and from several threads: half a line is kept until the rest comes.
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._line(line.rstrip())
        return len(text)
