"""Ctrl-C, SIGTERM and SIGHUP as exceptions in the main thread: once, and never between steps that belong together."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from normconvert.errors import HungUp, Terminated

PATIENCE = 3.0
"""Seconds in which further signals are the same wish: who holds Ctrl-C down does not mean to leave half a folder."""

_KINDS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
if hasattr(signal, "SIGHUP"):
    _KINDS[signal.SIGHUP] = HungUp


class _Interrupts:
    """What is known of the signals of this process."""

    def __init__(self) -> None:
        self.held, self.last = 0, -PATIENCE
        self.pending: type[KeyboardInterrupt] | None = None

    def handle(self, number: int, frame: Any) -> None:
        """Raise, now or when what must not be interrupted has ended."""
        if self.held:
            self.pending = _KINDS[number]
            return
        if time.monotonic() - self.last < PATIENCE:
            return
        self.last = time.monotonic()
        raise _KINDS[number]


_STATE = _Interrupts()


def install() -> None:
    """Take over the signals that would end this process or raise an exception; those that are ignored stay ignored."""
    for number in _KINDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _STATE.handle)


def ignore() -> None:
    """From here on nothing interrupts: the exit status is settled."""
    for number in _KINDS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Put interruptions off until the block has ended; they are raised then, unless an exception is on its way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _STATE.held += 1
    try:
        yield
    finally:
        _STATE.held -= 1
    pending, _STATE.pending = _STATE.pending, (_STATE.pending if _STATE.held else None)
    if pending is not None and not _STATE.held:
        _STATE.last = time.monotonic()
        raise pending
