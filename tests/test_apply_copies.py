"""What is copied while the model is traced: it cannot be seen in the result, and nothing of it stays behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normconvert import apply_scan, convert
from normconvert.apply_blocks import HALVES, Workspace
from normconvert.apply_scan import SourceReader
from normconvert.errors import InputError, TraceError
from tests.tiny_checkpoints import contents, gpt2, save

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the kernel does not copy here")


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Have the reader come to its end before the writer asks for copies; what it was then told."""
    told: list[dict[str, int]] = []
    keep = SourceReader.keep_copies

    def late(self: SourceReader, names: Any) -> dict[str, int]:
        self.join()
        told.append(keep(self, names))
        return told[-1]

    monkeypatch.setattr(SourceReader, "keep_copies", late)
    return told


@pytest.fixture(params=["safetensors", "sharded"])
def src(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(gpt2(), tmp_path / "src", request.param)


def without_copies(src: Path, out: Path, **options: Any) -> dict[str, bytes]:
    """The output of a conversion to which nothing was copied before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "copy_file_range")
        convert(src, out, verify=False, **options)
    return contents(out)


def test_what_was_copied_is_kept_or_written_over(src: Path, tmp_path: Path, finished: list[dict[str, int]]) -> None:
    report = convert(src, tmp_path / "out", verify=False)
    sizes = {path.name: path.stat().st_size for path in src.glob("*.safetensors")}
    assert finished == [sizes]
    assert report.tensors_edited
    assert contents(tmp_path / "out") == without_copies(src, tmp_path / "plain")


def test_half_a_copy_is_completed(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_scan, "CHUNK", 1 << 10)
    done: list[int] = []
    copy = SourceReader._copy

    def some(self: SourceReader, origin: int, name: str, at: int, count: int) -> None:
        done.append(at)
        if len(done) != 20:  # one gap: nothing after it may be taken for copied
            copy(self, origin, name, at, count)

    monkeypatch.setattr(SourceReader, "_copy", some)
    convert(src, tmp_path / "out", verify=False)
    assert len(done) > 20
    assert contents(tmp_path / "out") == without_copies(src, tmp_path / "plain")


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"max_shard_size": 1 << 14}, {"fold": True}], ids=str)
def test_files_with_another_layout(src: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    convert(src, tmp_path / "out", verify=False, **options)
    assert contents(tmp_path / "out") == without_copies(src, tmp_path / "plain", **options)


def test_a_copy_under_another_name_does_not_stay(
    src: Path, tmp_path: Path, finished: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normconvert.apply_write.Writer._as_is", lambda self, file: False)
    convert(src, tmp_path / "out", verify=False)
    assert finished == [{}]
    assert contents(tmp_path / "out") == without_copies(src, tmp_path / "plain")


def test_a_full_disk_while_copying_is_left_to_the_writer(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with SourceReader() as reader:
        monkeypatch.setattr(os, "copy_file_range", full)
        (tmp_path / "copies").mkdir()
        from normconvert.sources import open_source

        reader.begin(open_source(str(src)).tensors.values(), src, tmp_path / "copies")
        reader.finish()
    assert set(reader.keep_copies({path.name for path in src.glob("*.safetensors")}).values()) == {0}


@pytest.mark.parametrize("error", [TraceError("no"), KeyboardInterrupt()], ids=str)
def test_nothing_stays_when_the_trace_fails(
    src: Path, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("normconvert.pipeline.plan_model", fail)
    with pytest.raises(type(error)):
        convert(src, tmp_path / "new" / "out", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_the_same_in_float64(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    wide: Tensor = Workspace().widened(bits)
    assert wide.dtype == torch.float64
    assert torch.equal(wide.nan_to_num(), bits.to(torch.float64).nan_to_num())
