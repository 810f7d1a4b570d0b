"""The output folder: all or nothing, with the other files of the source, and the source untouched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normconvert.apply.output_folder import staged_output
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import open_source
from tests.support.applied_plans import apply_plan
from tests.support.tiny_checkpoints import contents, gpt2, save

PLAN = Plan("rmsnorm", tensors={"transformer.wpe.weight": [{"op": "center", "axis": 1}]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(gpt2(), tmp_path / "src")


def _write_and_fail(staging: Path) -> None:
    (staging / "model.safetensors").write_bytes(b"half")
    raise RuntimeError("verification failed")


def leftovers(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.name != "src")


def test_other_files_come_along_and_other_weights_do_not(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / ".git").mkdir()
    kept = {"LICENSE": b"free", "tokenizer.model": b"\0\1", "sub/extra.json": b"{}"}
    dropped = {"tf_model.h5": b"", "pytorch_model.bin": b"", "training_args.bin": b"", ".git/HEAD": b"ref"}
    dropped |= {"custom.py": b"x = 1\n"}
    for name, data in {**kept, **dropped}.items():
        (folder / name).write_bytes(data)
    (folder / "away.txt").symlink_to("/etc/hostname")
    result = apply_plan(open_source(str(folder)), PLAN, tmp_path / "out", extra_files={"a/note.txt": "hello"})
    out = contents(tmp_path / "out")
    assert set(out) == {*kept, "config.json", "generation_config.json", "model.safetensors", "a/note.txt"}
    assert {name: out[name] for name in kept} == kept
    assert result.files == tuple(sorted(out))
    assert any("away.txt" in note for note in result.notes)


def test_an_output_that_exists_is_kept_unless_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    apply_plan(open_source(str(folder)), PLAN, out)  # an empty folder is no obstacle
    (out / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        apply_plan(open_source(str(folder)), PLAN, out)
    assert (out / "mine.txt").read_text() == "precious"
    # Not what a conversion made: nobody can make it again.
    with pytest.raises(InputError, match="was not made by normconvert"):
        apply_plan(open_source(str(folder)), PLAN, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "precious"
    (out / "normconvert.json").write_text('{"format": 1}')
    apply_plan(open_source(str(folder)), PLAN, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert leftovers(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_output(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    apply_plan(open_source(str(folder)), PLAN, out, extra_files={"normconvert.json": '{"format": 1}'})
    before = contents(out)
    with pytest.raises(RuntimeError, match="verification"), staged_output(out, folder, overwrite=True) as staging:
        _write_and_fail(staging)
    assert contents(out) == before
    assert leftovers(tmp_path) == ["out"]


def test_staged_output_appears_only_at_the_end(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged_output(out, folder) as staging:
        (staging / "x").write_text("x")
        assert not out.exists()
    assert contents(out) == {"x": b"x"}
    with pytest.raises(KeyboardInterrupt), staged_output(tmp_path / "other" / "out", folder):
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == ["deep"]


@pytest.mark.parametrize("where", ["src", "src/out", ".", "src/../src"])
def test_outputs_that_overlap_the_source_are_refused(folder: Path, tmp_path: Path, where: str) -> None:
    before = contents(folder)
    with pytest.raises(InputError, match="source"):
        apply_plan(open_source(str(folder)), PLAN, tmp_path / where, overwrite=True)
    assert contents(folder) == before
    assert leftovers(tmp_path) == []


def test_a_link_to_the_source_is_the_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    with pytest.raises(InputError, match="source"):
        apply_plan(open_source(str(folder)), PLAN, tmp_path / "link", overwrite=True)
    assert (folder / "model.safetensors").is_file()


CHILD = """
import resource, sys, time
from pathlib import Path
from tests.support.applied_plans import apply_plan
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import open_source
mode, src, out = sys.argv[1:]
source = open_source(src)
plan = Plan("x", tensors={"transformer.wpe.weight": [{"op": "center", "axis": 1}]})
def progress(name, done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(60)
if mode == "full":
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    apply_plan(source, plan, Path(out), progress=progress if mode == "interrupt" else None)
except InputError as error:
    print("InputError", error)
    sys.exit(2)
"""


def test_ctrl_c_half_way_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "interrupt", str(folder), str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    assert [name for name in leftovers(tmp_path) if ".partial-" in name]  # it really was half-way
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT, errors
    assert leftovers(tmp_path) == []
    assert contents(folder) == before


def test_a_write_that_fails_half_way_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "full", str(folder), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write the output" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert leftovers(tmp_path) == []
    assert contents(folder) == before


def test_a_full_disk_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tiny disk needs the right to mount")
    try:
        with pytest.raises(InputError, match=r"cannot write the output: No space left"):
            apply_plan(open_source(str(folder)), PLAN, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        for _ in range(20):
            if subprocess.run(["umount", str(disk)], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)


def start_and_stop_half_way(folder: Path, out: Path, number: int) -> subprocess.Popen[str]:
    """A conversion by the command line, sent a signal when some of its output is there."""
    slow = (
        "import time, normconvert.apply.writer as w; f = w._write_all; w._write_all = lambda *a: (f(*a), time.sleep(1))"
    )
    main = "from normconvert.cli import main; import sys; sys.argv[1:] = sys.argv[1:]; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{slow}; {main}", "rmsnorm", str(folder), str(out), "--no-verify"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(600):
        if list(out.parent.glob(".out.partial-*/*.safetensors")):
            break
        time.sleep(0.1)
    child.send_signal(number)
    return child


def test_a_terminated_conversion_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    child = start_and_stop_half_way(folder, tmp_path / "out", signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 143, errors
    assert errors.endswith("interrupted; nothing was written\n")
    assert leftovers(tmp_path) == []


def test_what_a_killed_conversion_left_goes_with_the_next(folder: Path, tmp_path: Path) -> None:
    start_and_stop_half_way(folder, tmp_path / "out", signal.SIGKILL).communicate(timeout=60)
    left = leftovers(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".out.partial-")
    (tmp_path / ".other.partial-1").mkdir()
    with staged_output(tmp_path / "out", folder) as running:
        assert leftovers(tmp_path) == sorted([running.name, ".other.partial-1"])
        with staged_output(tmp_path / "out", folder):  # it may not sweep what is being made
            assert running.is_dir()
    assert leftovers(tmp_path) == [".other.partial-1", "out"]


def test_an_output_that_stepped_aside_for_one_that_never_came_is_put_back(folder: Path, tmp_path: Path) -> None:
    aside = tmp_path / ".out.old-1"
    aside.mkdir()
    (aside / "mine.txt").write_text("precious")
    (aside / "normconvert.json").write_text('{"format": 1}')
    with pytest.raises(RuntimeError), staged_output(tmp_path / "out", folder, overwrite=True) as staging:
        _write_and_fail(staging)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert leftovers(tmp_path) == ["out"]


def test_a_source_that_changes_meanwhile_is_noticed(folder: Path, tmp_path: Path) -> None:
    def written_to(name: str, done: int, total: int) -> None:
        os.utime(folder / "model.safetensors")

    with pytest.raises(InputError, match="changed while it was converted"):
        apply_plan(open_source(str(folder)), PLAN, tmp_path / "out", progress=written_to)
    assert leftovers(tmp_path) == []
