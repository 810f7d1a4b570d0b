"""Ctrl-C, SIGTERM and SIGHUP as exceptions in the main thread: once, and never between steps that belong together."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from normconvert.errors import HungUp, Terminated

PATIENCE = 3.0
"""Seconds in which further signals are the same wish: who holds Ctrl-C down does not mean to leave half a folder."""

IMPORTS = 30.0
"""Seconds that an import is waited for. torch's ends in an abort, others in "not installed", if an exception is raised
in the middle of it."""
AGAIN = 0.05
"""Seconds until it is asked again whether the import is over."""

_KINDS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
if hasattr(signal, "SIGHUP"):
    _KINDS[signal.SIGHUP] = HungUp


class _Interrupts:
    """What is known of the signals of this process."""

    def __init__(self) -> None:
        self.held, self.last = 0, -PATIENCE
        self.pending: type[KeyboardInterrupt] | None = None
        self.raised: KeyboardInterrupt | None = None
        self.deferred: float | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise, now or when what must not be interrupted has ended."""
        if self.held:
            self.pending = _KINDS[number]
            return
        now = time.monotonic()
        if now - self.last < PATIENCE:
            return
        if _importing(frame) and now - (self.deferred or now) < IMPORTS:
            self.deferred = self.deferred or now
            _send_later(number)
            return
        self.deferred = None
        self.interrupt(_KINDS[number])

    def interrupt(self, kind: type[KeyboardInterrupt]) -> NoReturn:
        """Raise, and remember it: what is running may make another exception of it."""
        self.last, self.raised = time.monotonic(), kind()
        raise self.raised


def _send_later(number: int) -> None:
    """The same signal once more, a moment later."""
    timer = threading.Timer(AGAIN, _send, (number,))
    timer.daemon = True
    timer.start()


def _send(number: int) -> None:
    """A signal to the main thread, which it wakes from whatever it waits for, where the system can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def _importing(frame: FrameType | None) -> bool:
    """Whether Python is in the middle of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_STATE = _Interrupts()


def install() -> None:
    """Take over the signals that would end this process or raise an exception; those that are ignored stay ignored."""
    for number in _KINDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _STATE.handle)
    sys.unraisablehook = partial(_unraisable, sys.unraisablehook)


def _unraisable(otherwise: Callable[[sys.UnraisableHookArgs], Any], what: sys.UnraisableHookArgs) -> None:
    """Python prints what is raised in a destructor, and goes on: an interruption comes once more."""
    if what.exc_value is None or what.exc_value is not _STATE.raised:
        otherwise(what)
        return
    _STATE.last, _STATE.raised = -PATIENCE, None
    _send_later(next(number for number, kind in _KINDS.items() if type(what.exc_value) is kind))


def take() -> KeyboardInterrupt | None:
    """The interruption that was raised since this was last asked, whatever has become of it.

    Libraries catch what ends an import of theirs, and say that they are not installed.
    """
    taken, _STATE.raised = _STATE.raised, None
    return taken


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
        _STATE.interrupt(pending)
