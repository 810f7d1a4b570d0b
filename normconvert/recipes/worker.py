"""A process that does one job after the other for :mod:`normconvert.recipes.local`.

Jobs come in and events go out as lines of JSON on standard input and output; what libraries print goes to standard
error. When standard input ends, whoever started the process is gone and so is the reason to go on.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import warnings
from typing import Any, BinaryIO

PARENT_GONE = 17
"""Exit status of a worker whose parent ended while it worked."""


def main() -> None:
    """Serve until standard input ends."""
    # Unbuffered: what is said just before the process dies is what one wants to know.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing that a library prints may come between the events
    hush()
    jobs: queue.Queue[bytes | None] = queue.Queue()
    idle = threading.Event()
    idle.set()
    threading.Thread(target=_read, args=(sys.stdin.buffer, jobs, idle), daemon=True).start()
    _tell(out, "ready", {})
    from normconvert.recipes.job import Job
    from normconvert.recipes.work import perform

    while (line := jobs.get()) is not None:
        job = Job.from_json(json.loads(line))
        result = perform(job, lambda kind, data: _tell(out, kind, data), f"process {os.getpid()}")
        idle.set()  # before the parent hears of it and sends more
        _tell(out, "end", {"result": result.to_json()})


def _read(stream: BinaryIO, jobs: queue.Queue[bytes | None], idle: threading.Event) -> None:
    for line in stream:
        # Here, not when the job is taken: the end of the input may be the very next thing that is read.
        idle.clear()
        jobs.put(line)
    # To an idle process the end of its input is the end; one that works does so for nobody.
    jobs.put(None)
    if not idle.is_set():
        os._exit(PARENT_GONE)  # no clean-up: the claim ends with the process


def _tell(out: BinaryIO, kind: str, data: dict[str, Any]) -> None:
    try:
        out.write(json.dumps({"kind": kind, "data": data}).encode() + b"\n")
    except BrokenPipeError:
        os._exit(PARENT_GONE)


def hush() -> None:
    """Libraries keep their progress bars and their advice to themselves."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for library in ("transformers", "timm", "torch", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
