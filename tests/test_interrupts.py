"""Signals: they end what runs once, and never in the middle of an import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normconvert import interrupts
from normconvert.report.screen import Done, Screen, execute

SLOW = """
import time
for _ in range(30):
    time.sleep(0.01)
print("imported", flush=True)
"""
PROGRAM = """
import sys
from normconvert import interrupts
interrupts.install()
sys.path.insert(0, sys.argv[1])
print("ready", flush=True)
try:
    try:
        {body}
    except Exception:
        sys.exit("lost")
except KeyboardInterrupt as error:
    print(type(error).__name__, type(interrupts.take()).__name__, interrupts.take())
"""


def ended(folder: Path, number: int, body: str, times: int = 1) -> list[str]:
    """What a program prints that gets a signal a few times, soon after it says that it is ready."""
    command = [sys.executable, "-c", PROGRAM.format(body=body), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        time.sleep(0.05)
        process.send_signal(number)
    found = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    return found


@pytest.mark.parametrize(
    ("number", "kind"), [("SIGTERM", "Terminated"), ("SIGHUP", "HungUp"), ("SIGINT", "KeyboardInterrupt")]
)
def test_an_import_is_finished_first(tmp_path: Path, number: str, kind: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    found = ended(tmp_path, getattr(signal, number), "import slow; import time; time.sleep(20)", times=3)
    assert found == ["imported", f"{kind} {kind} None"]


DYING = """
import time
class Dying:
    def __del__(self):
        time.sleep(0.5)
"""


def test_a_destructor_does_not_swallow_it(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    body = "import dying, time; one = dying.Dying(); del one; time.sleep(20)"
    assert ended(tmp_path, signal.SIGTERM, body) == ["Terminated Terminated None"]


def test_without_an_import_nothing_is_waited_for(tmp_path: Path) -> None:
    assert ended(tmp_path, signal.SIGTERM, "import time; time.sleep(20)") == ["Terminated Terminated None"]


def _interrupted_while_a_library_imports() -> Done:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    except KeyboardInterrupt:
        raise ModuleNotFoundError("is it installed?") from None
    raise AssertionError


def test_what_a_library_makes_of_an_interruption_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        interrupts.install()
        interrupts._STATE.last = -interrupts.PATIENCE
        assert execute(Screen(), _interrupted_while_a_library_imports) == 143
        assert interrupts.take() is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
