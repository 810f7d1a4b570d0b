"""Nothing that lies in the current folder is imported by the processes that are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from normconvert.apply.scan_process import ScanProcess
from normconvert.files.child_interpreter import child_interpreter, import_path
from normconvert.recipes.job import Job
from normconvert.recipes.local import execute

STDLIB = ("json", "sys", "signal", "numpy", "torch", "queue", "hashlib", "normconvert")


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose modules leave a trace when they are imported."""
    for name in STDLIB:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    # As `python -c` and `python -m` have it.
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return tmp_path / "ran"


def test_the_trap_works_without_protection(traps: Path) -> None:
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    assert traps.read_text() == "numpy"


def test_a_child_imports_nothing_of_the_current_folder(traps: Path) -> None:
    assert os.getcwd() not in import_path()
    told = subprocess.run(
        child_interpreter("import normconvert, numpy; print(normconvert.__file__, sys.argv)", "x"),
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert not traps.exists()
    assert str(Path(__file__).parents[2]) in told
    assert told.rstrip().endswith("['-c', 'x']")


def test_the_reading_process_imports_nothing_of_it(traps: Path, tmp_path: Path) -> None:
    found: list[tuple[str, ...]] = []
    (tmp_path / "a.bin").write_bytes(b"x")
    ScanProcess({str(tmp_path / "a.bin"): []}, lambda *what: found.append(what)).run()
    assert [what[0] for what in found] == ["hash"]
    assert not traps.exists()


def test_the_processes_of_a_batch_import_nothing_of_it(traps: Path, tmp_path: Path) -> None:
    job = Job("no-such/model", "a", "b", str(tmp_path / "out"), "r", "rmsnorm", {})
    events = list(execute({0: job}))
    assert [event.kind for event in events][-1] == "end"
    assert "no-such/model" in events[-1].data["result"]["message"]
    assert not traps.exists()
