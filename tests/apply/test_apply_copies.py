"""What is copied while the model is traced: it cannot be seen in the result, and nothing of it stays behind."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normconvert import convert
from normconvert.apply import scan as scanning
from normconvert.apply import source_reader as apply_scan
from normconvert.apply.blocks import HALVES, Workspace
from normconvert.apply.scan import Scan
from normconvert.apply.scan_process import ScanProcess
from normconvert.apply.source_reader import SourceReader
from normconvert.errors import InputError, TraceError
from normconvert.sources import open_source
from tests.support.tiny_checkpoints import contents, gpt2_without_head, save

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the kernel does not copy here")


@pytest.fixture(params=["thread", "process"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a process of its own reads, as it does for large checkpoints."""
    if request.param == "process":
        monkeypatch.setattr(apply_scan, "APART", 0)
    return bool(request.param == "process")


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, apart: bool) -> list[dict[str, int]]:
    """Have the reader come to its end before the writer asks for copies; what it was then told."""
    told: list[dict[str, int]] = []
    keep = SourceReader.keep_copies

    def late(self: SourceReader, names: Any) -> dict[str, int]:
        assert self._thread is not None
        assert isinstance(self._scan, ScanProcess) == apart
        self._thread.join()
        told.append(keep(self, names))
        return told[-1]

    monkeypatch.setattr(SourceReader, "keep_copies", late)
    return told


@pytest.fixture(scope="module", params=["safetensors", "sharded"])
def src(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a head: then no other class of its family is traced."""
    torch.manual_seed(0)
    return save(gpt2_without_head(), tmp_path_factory.mktemp("copies") / "src", request.param)


Plain = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def without_copies(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The output of a conversion to which nothing was copied before."""

    @functools.cache
    def plain(options: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("plain") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "copy_file_range")
            convert(src, out, verify=False, **json.loads(options))
        return contents(out)

    return lambda **options: plain(json.dumps(options))


@pytest.mark.parametrize("method", ["rmsnorm", "fold"])
def test_what_was_copied_is_kept_or_written_over(
    method: str, src: Path, tmp_path: Path, finished: list[dict[str, int]], without_copies: Plain
) -> None:
    report = convert(src, tmp_path / "out", method=method, verify=False)
    sizes = {path.name: path.stat().st_size for path in src.glob("*.safetensors")}
    assert finished == [sizes]
    assert report.tensors_edited
    assert contents(tmp_path / "out") == without_copies(method=method)


def test_half_a_copy_is_completed(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_copies: Plain
) -> None:
    monkeypatch.setattr(scanning, "CHUNK", 1 << 10)
    done: list[int] = []
    copy = Scan._copy

    def some(self: Scan, origin: int, name: str, at: int, count: int) -> None:
        done.append(at)
        if len(done) != 20:  # one gap: nothing after it may be taken for copied
            copy(self, origin, name, at, count)

    monkeypatch.setattr(Scan, "_copy", some)
    convert(src, tmp_path / "out", verify=False)
    assert len(done) > 20
    assert contents(tmp_path / "out") == without_copies()


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"max_shard_size": 1 << 14}, {"fold": True}], ids=str)
def test_files_with_another_layout(src: Path, tmp_path: Path, options: dict[str, Any], without_copies: Plain) -> None:
    convert(src, tmp_path / "out", verify=False, **options)
    assert contents(tmp_path / "out") == without_copies(**options)


def test_a_copy_under_another_name_does_not_stay(
    src: Path, tmp_path: Path, finished: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch, without_copies: Plain
) -> None:
    monkeypatch.setattr("normconvert.apply.writer.Writer._as_is", lambda self, file: False)
    convert(src, tmp_path / "out", verify=False)
    assert finished == [{}]
    assert contents(tmp_path / "out") == without_copies()


def test_a_full_disk_while_copying_is_left_to_the_writer(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with SourceReader() as reader:
        monkeypatch.setattr(os, "copy_file_range", full)
        (tmp_path / "copies").mkdir()
        reader.begin(open_source(str(src)).tensors.values(), src, tmp_path / "copies")
        reader.finish()
    assert set(reader.keep_copies({path.name for path in src.glob("*.safetensors")}).values()) == {0}


@pytest.mark.parametrize("error", [TraceError("no"), KeyboardInterrupt()], ids=str)
def test_nothing_stays_when_the_trace_fails(
    src: Path, tmp_path: Path, error: BaseException, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("normconvert.rewrites.planning.planned", fail)
    with pytest.raises(type(error)):
        convert(src, tmp_path / "new" / "out", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(
    src: Path, tmp_path: Path, finished: list[dict[str, int]]
) -> None:
    def stage(name: str) -> None:
        if name == "write":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").touch()

    with pytest.raises(InputError, match="exists and is not empty"):
        convert(src, tmp_path / "out", verify=False, stage=stage)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_weight_that_is_not_finite_is_found_by_the_process(src: Path, tmp_path: Path, apart: bool) -> None:
    model = gpt2_without_head()
    model.get_parameter("h.0.mlp.c_fc.weight").data[-1, -1] = float("inf")
    source = open_source(str(save(model, tmp_path / "bad")))
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_fc\.weight holds a value that is NaN or infinite"):
        convert(source.reference, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_hashes_are_those_of_the_files(src: Path, apart: bool) -> None:
    import hashlib

    with SourceReader() as reader:
        reader.begin(open_source(str(src)).tensors.values(), src)
        reader.finish()
    files = [*src.glob("*.safetensors"), src / "config.json"]
    assert reader.hashes == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_process_that_is_killed_is_made_up_for(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_copies: Plain
) -> None:
    monkeypatch.setattr(apply_scan, "APART", 0)
    run, killed = ScanProcess.run, []

    def kill_and_run(self: ScanProcess) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        killed.append(self._process.pid)
        run(self)

    monkeypatch.setattr(ScanProcess, "run", kill_and_run)
    convert(src, tmp_path / "out", verify=False)
    assert killed
    assert contents(tmp_path / "out") == without_copies()


def test_what_an_interpreter_says_at_its_start_is_passed_over(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('hello'); print(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr(apply_scan, "APART", 0)
    with SourceReader() as reader:
        reader.begin(open_source(str(src)).tensors.values(), src)
        reader.finish()
    assert set(reader.hashes) == {path.name for path in [*src.glob("*.safetensors"), src / "config.json"]}


def test_without_another_process_a_thread_reads(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_copies: Plain
) -> None:
    monkeypatch.setattr(apply_scan, "APART", 0)
    monkeypatch.setattr(sys, "executable", "")
    convert(src, tmp_path / "out", verify=False)
    monkeypatch.undo()
    assert contents(tmp_path / "out") == without_copies()


def test_a_file_that_has_gone_is_reported_as_by_a_thread(src: Path, tmp_path: Path, apart: bool) -> None:
    tensors = list(open_source(str(shutil.copytree(src, tmp_path / "gone"))).tensors.values())
    for file in {tensor.file for tensor in tensors}:
        file.rename(file.with_suffix(".gone"))
    with SourceReader() as reader:
        reader.begin(tensors)
        with pytest.raises(FileNotFoundError, match=r"\.safetensors"):
            reader.finish()


def test_the_process_ends_with_the_one_that_waits(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 36)  # minutes of reading
    code = (
        "import sys, time; from normconvert.apply.scan_process import ScanProcess; "
        "s = ScanProcess({sys.argv[1]: []}, print); print(s._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "large")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        reader = int(parent.stdout.readline())
        os.kill(reader, 0)
        parent.kill()
    for _ in range(100):
        if not _runs(reader):
            return
        time.sleep(0.1)
    os.kill(reader, signal.SIGKILL)
    pytest.fail("the process reads on")


def _runs(process: int) -> bool:
    """Whether it is there and no zombie that waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_the_same_in_float64(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    wide: Tensor = Workspace().widened(bits)
    assert wide.dtype == torch.float64
    assert torch.equal(wide.nan_to_num(), bits.to(torch.float64).nan_to_num())
