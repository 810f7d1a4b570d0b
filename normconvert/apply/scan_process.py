"""A :class:`~normconvert.apply.scan.Scan` in a process of its own.

Beside a thread that imports, builds and traces, a thread that reads gets the interpreter only now and then, and takes
half as long again. The two processes talk in lines of JSON: first the order, then ``keep`` from the one, and what is
found from the other. Whichever goes, the other notices that the pipe has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from normconvert.apply.scan import Scan, Span, Tell
from normconvert.files.child_interpreter import child_interpreter


class ProcessGone(Exception):
    """The process ended before its work was done: it was killed, or cannot run here."""


class ScanProcess:
    """The same methods as :class:`~normconvert.apply.scan.Scan`, with the same arguments.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self, files: Mapping[str, Iterable[Span]], tell: Tell, hashing: bool = True, copies: str | None = None
    ) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("this program is no Python interpreter")
        self._tell = tell
        self._kept: SimpleQueue[dict[str, int]] = SimpleQueue()
        self._stopped = False
        # Not by multiprocessing, which would run the program's main module again.
        self._process = subprocess.Popen(
            child_interpreter("from normconvert.apply.scan_process import serve; serve()"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._say([{path: list(spans) for path, spans in files.items()}, hashing, copies])

    def run(self) -> None:
        """Take what the process finds until it is done.

        Raises:
            OSError: a file cannot be read.
            ProcessGone: the process ended before.
        """
        assert self._process.stdout is not None
        ended, copied = False, dict[str, int]()
        try:
            for line in self._process.stdout:
                try:
                    kind, *found = json.loads(line)
                except (ValueError, TypeError):  # an interpreter may be told to say something when it starts
                    continue
                if kind == "copied":
                    copied = found[0]
                    self._kept.put(copied)
                elif kind == "error":
                    raise OSError(*found)
                elif kind == "end":
                    ended, copied = True, found[0]
                    break
                else:
                    self._tell(kind, *found)
        finally:
            self._kept.put(copied)  # for whoever asks now, or has asked
            self._end()
        # Without this a killed process would pass for one that found nothing bad.
        if not (ended or self._stopped):
            raise ProcessGone(f"status {self._process.returncode}")

    def stop(self) -> None:
        """End the pass."""
        # Before the end of the process, which run() would take for an accident.
        self._stopped = True
        self._process.kill()

    def keep(self) -> dict[str, int]:
        """Stop copying. Returns how many bytes of each file, by its name, are there."""
        # The answer comes to the thread in run(), which alone reads the pipe.
        self._say("keep")
        return self._kept.get()

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has gone, which `run` sees
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def _end(self) -> None:
        # The pipes first: the end of its input is what the process waits for.
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        self._process.wait()


def serve() -> None:
    """The other process: read the order, do it, and stay until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that waits for this
    lock = threading.Lock()

    def say(*what: Any) -> None:
        try:
            # Two threads speak, and lines must not get into each other.
            with lock:
                sys.stdout.write(json.dumps(what) + "\n")
                sys.stdout.flush()
        except OSError:
            os._exit(0)  # nobody waits

    files, hashing, copies = json.loads(sys.stdin.readline())
    scan = Scan({path: [Span(*span) for span in spans] for path, spans in files.items()}, say, hashing, copies)

    def listen() -> None:
        for _ in sys.stdin:
            say("copied", scan.keep())
        os._exit(0)

    # Before the pass begins, so that "keep" and the end of the pipe are noticed in the middle of a file.
    threading.Thread(target=listen, daemon=True).start()
    try:
        scan.run()
        say("end", scan.keep())
    except OSError as error:
        # In parts, so that the other side raises the same error.
        say("error", error.errno, error.strerror, error.filename)


__all__ = ["ProcessGone", "ScanProcess", "serve"]
