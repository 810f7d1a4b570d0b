"""Reports are written over reports alone; what is printed is text."""

from __future__ import annotations

from pathlib import Path

import pytest

from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.report.outputs import FileOutput
from normconvert.report.screen import Done, Screen, execute
from normconvert.wording.printable import printable


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    (tmp_path / "w.safetensors").write_bytes(b"\x08weights")
    (tmp_path / "r.yaml").write_text("sources: [model]\n")
    (tmp_path / "b.json").write_text('{"exit_status": 0}')
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect model --json model/config.json",
        "inspect model --json=model/new.json",
        "rmsnorm w.safetensors --json w.safetensors",  # OUT is missing: an error has a document, too
        "inspect w.safetensors --json w.safetensors",
        "inspect w.safetensors --report w.safetensors",
        "verify model model --junit model/config.json",
        "verify model model --markdown w.safetensors",
        "verify model model --bench b.json --json b.json",
        "run r.yaml --json r.yaml",
        "run r.yaml --json model/config.json",
        "inspect demo:vit --json x --report x",
        "inspect demo:vit --report b.json",
    ],
)
def test_no_report_is_written_over_anything_else(
    here: Path, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert run(arguments.split()) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_report_is_written_over_a_report(here: Path) -> None:
    for path in ("b.json", "new.json"):
        output = FileOutput("--json", path, lambda document: '{"exit_status": 1}', '"exit_status"', ["inspect", "x"])
        output.write({})
        output.write({})
        assert Path(path).read_text() == '{"exit_status": 1}'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\r\x07", "a\\x1b[2Jb\\r\\x07"),
        ("\x1b[1mbold\x1b[0m", "\x1b[1mbold\x1b[0m"),
        ("x\n  ::error::y", "x\n  \\::error::y"),
        ("a ##[error]b", "a \\##[error]b"),
        ("\x1b[1m::add-mask::x", "\\::add-mask::x"),
        ("\u202eevil\u2028", "\\u202eevil\\u2028"),
        ("\udce9", "\\udce9"),
        ("größer\t→", "größer\t→"),
    ],
)
def test_what_is_printed_is_text(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_message_is_a_command_of_a_runner(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Done:
        raise InputError("tensor a\n::error::forged\n\x1b[2J")

    assert execute(Screen(), fail) == 2
    assert execute(Screen(), lambda: Done({}, lambda console: console.print("::error::forged"))) == 0
    printed = capsys.readouterr()
    assert not any(line.lstrip().startswith("::") for line in (printed.out + printed.err).splitlines())
    assert "\x1b[2J" not in printed.err
