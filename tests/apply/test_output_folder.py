"""Nothing is lost: what may be replaced, in one step, and what a process that is killed in between leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normconvert import interrupts
from normconvert.apply import output_folder
from normconvert.apply.folder_lock import locked, workplace
from normconvert.apply.other_files import copy_other_files
from normconvert.apply.output_folder import check_output, replace, staged_output, sweep
from normconvert.errors import InputError, Terminated
from tests.support.tiny_checkpoints import contents


def output(folder: Path, text: str) -> Path:
    """A folder such as a conversion makes."""
    folder.mkdir()
    (folder / "normconvert.json").write_text('{"format": 1}')
    (folder / "data").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "./", "x/.."])
def test_the_current_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "normconvert.json").write_text('{"format": 1}')
    monkeypatch.chdir(inner)
    with pytest.raises(InputError, match="the current folder"):
        check_output(Path(name), None, overwrite=True)


@pytest.mark.parametrize("record", [None, "", "[]", "{}", '{"a": 1}', "[" * 100_000, "\0"])
def test_only_outputs_are_replaced(tmp_path: Path, record: str | None) -> None:
    out = output(tmp_path / "out", "mine")
    check_output(out, None, overwrite=True)
    if record is None:
        (out / "normconvert.json").unlink()
    else:
        (out / "normconvert.json").write_text(record)
    with pytest.raises(InputError, match="was not made by normconvert"):
        check_output(out, None, overwrite=True)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_was_put_there_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # as on systems that have no such call
        monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    new, out = output(tmp_path / "new", "new"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="left as it is"):
        replace(new, out)
    assert contents(out) == {"thesis.tex": b"mine"}
    (out / "thesis.tex").unlink()
    replace(new, out)
    assert (out / "data").read_text() == "new"
    replace(output(tmp_path / "new", "newer"), out)
    assert (out / "data").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from normconvert.apply import output_folder
if sys.argv[3] == "renames":
    output_folder._exchange = lambda one, other: False
calls, at = 0, int(sys.argv[4])
def die(event, arguments):
    global calls
    if event in ("os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "ctypes.dlsym"):
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
output_folder.replace(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["exchange", "renames"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_killed_at_any_step_one_of_the_two_is_whole(tmp_path: Path, how: str, at: int) -> None:
    new, out = output(tmp_path / ".out.partial-1", "new"), output(tmp_path / "out", "old")
    subprocess.run([sys.executable, "-c", KILLED, str(new), str(out), how, str(at)], check=False)
    sweep(out)
    assert (out / "data").read_text() in ("old", "new")
    assert (out / "normconvert.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_workplace_that_was_removed_and_made_anew_is_locked_anew(tmp_path: Path) -> None:
    """A lock on a folder that is gone keeps nobody out."""
    folder = tmp_path / "work"
    folder.mkdir()
    with locked(folder):
        folder.rename(tmp_path / "gone")
        with (
            workplace(folder, tmp_path / "out"),
            pytest.raises(InputError, match="another process is making it"),
            workplace(folder, tmp_path / "out", patience=0.1),
        ):
            pass


def test_links_and_code_do_not_come_along(tmp_path: Path) -> None:
    source, secret = tmp_path / "models--x" / "snapshots" / "c", tmp_path / "secret"
    source.mkdir(parents=True)
    (source.parent.parent / "blobs").mkdir()
    (source.parent.parent / "blobs" / "1").write_text("licence")
    secret.mkdir()
    (secret / "key").write_text("secret")
    (source / "LICENSE").symlink_to("../../blobs/1")
    (source / "README.md").symlink_to(secret / "key")
    (source / "up.txt").symlink_to("../../../secret/key")
    (source / "folder").symlink_to(secret, target_is_directory=True)
    (source / "loop").symlink_to("loop")
    (source / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "custom_generate/requirements.txt", "tok.py"):
        (source / name).write_text("print()")
    (source / "tokenizer_config.json").write_text('{"a": 1, "auto\\u005fmap": {"AutoTokenizer": ["tok.T", null]}}')
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_other_files(source, out)
    assert contents(out) == {"LICENSE": b"licence", "tokenizer_config.json": b'{\n  "a": 1\n}\n'}
    assert sorted(copied.links) == ["README.md", "folder", "up.txt"]
    assert len(copied.code) == 4
    plain = tmp_path / "snapshots" / "plain"  # a folder that only calls itself so
    plain.mkdir(parents=True)
    (plain / "x.txt").symlink_to(secret / "key")
    assert copy_other_files(plain, out).links == ["x.txt"]


def _interrupted_twice(done: Path) -> None:
    with interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.mkdir()


def test_an_interruption_waits_for_what_belongs_together(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupts.install()
        with pytest.raises(Terminated):
            _interrupted_twice(tmp_path / "done")
        assert (tmp_path / "done").is_dir()
        os.kill(os.getpid(), signal.SIGTERM)  # the same wish
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_nothing_stays_of_an_output_that_failed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_output(tmp_path / "a" / "out", None) as staging:
        (staging / "half" / "way").touch()
    assert list(tmp_path.iterdir()) == []
