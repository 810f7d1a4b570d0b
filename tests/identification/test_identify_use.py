"""Bare weights in use: converted as what they are, refused where that is not known, and the identify command."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normconvert
from normconvert.sources import open_source
from tests.support.bare_weights import TWINS, UNIQUE, hollow, names_of_model, state_of, write

# In use


def test_a_bare_file_converts_and_says_what_it_was_taken_for(tmp_path: Path) -> None:
    path = write(state_of(UNIQUE, num_classes=5), tmp_path / "w.safetensors")
    report = normconvert.convert(path, tmp_path / "out")
    assert report.architecture == UNIQUE
    assert report.converted == report.total > 0
    assert (
        report.notes[0] == f"identified as timm:{UNIQUE} by names and shapes, which fit no other; --arch overrides that"
    )
    model = normconvert.load(tmp_path / "out")
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 5)
    assert normconvert.verify(path, tmp_path / "out").passed


def test_arch_with_another_image_size_and_channels_converts(tmp_path: Path) -> None:
    arguments = {"img_size": 96, "in_chans": 1}
    path = write(state_of(UNIQUE, num_classes=2, **arguments), tmp_path / "w.safetensors")
    report = normconvert.convert(path, tmp_path / "out", arch=f"timm:{UNIQUE}")
    assert report.converted == report.total > 0
    assert "shapes say that the model was made with img_size=96" in report.notes
    assert normconvert.load(tmp_path / "out")(torch.zeros(1, 1, 96, 96)).shape == (1, 2)


def test_a_distilled_model_with_other_classes_opens(tmp_path: Path) -> None:
    state = state_of("deit_tiny_distilled_patch16_224", num_classes=5)
    source = open_source(str(write(state, tmp_path / "w.safetensors")))
    assert (source.architecture, source.config["num_classes"]) == ("deit_tiny_distilled_patch16_224", 5)


def test_a_folder_without_config_opens(tmp_path: Path) -> None:
    write(state_of(UNIQUE), tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    assert (source.library, source.architecture) == ("timm", UNIQUE)
    assert "identified as" in source.notes[0]


def test_bare_weights_verify_against_what_was_made_of_them(tmp_path: Path) -> None:
    """Names and shapes do not tell which of the two it is; the output does."""
    path = write(state_of("test_efficientnet_ln"), tmp_path / "w.safetensors")
    normconvert.convert(path, tmp_path / "out", arch="timm:test_efficientnet_ln", min_gain=1)
    assert normconvert.verify(path, tmp_path / "out").passed


# The command


def test_the_command_needs_no_torch_and_less_than_two_seconds(tmp_path: Path) -> None:
    """Of safetensors; a pickle is read by torch alone, which is to be trusted with it."""
    state = state_of("resnet50")
    write(state, tmp_path / "w.safetensors")
    code = (
        "import sys; from normconvert.cli import run; status = run(sys.argv[1:]);"
        "print(*({'torch', 'timm', 'transformers', 'numpy'} & set(sys.modules))); sys.exit(status)"
    )
    for name in ("w.safetensors",):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, "identify", str(tmp_path / name)], capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "resnet50" in done.stdout
        assert done.stdout.splitlines()[-1] == ""
        # Of processor time: other programs on the machine do not count.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from normconvert.cli import run

    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_lists_a_set_and_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(state_of("test_efficientnet_ln"), tmp_path / "w.safetensors")
    status, out, _ = command(capsys, "identify", path)
    assert status == 0
    assert "2 architectures, which may compute differently" in out
    assert all(name in out for name in TWINS)
    assert "--arch timm:NAME" in out
    status, _, err = command(capsys, "rmsnorm", path, tmp_path / "out")
    assert status == 2
    assert all(name in err for name in TWINS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "others"),
    [
        ("efficientnet_b0", ["fuse-bn", "ckpt.safetensors"], ["tf_efficientnet_b0"]),
        ("vit_tiny_patch16_224", ["rmsnorm", "ckpt.safetensors", "out"], ["deit_tiny_patch16_224"]),
    ],
)
def test_bare_weights_of_several_architectures_stop_the_process(
    name: str, arguments: list[str], others: list[str], tmp_path: Path
) -> None:
    hollow(names_of_model(name, num_classes=10), tmp_path / "ckpt.safetensors")
    command = [sys.executable, "-m", "normconvert", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ckpt.safetensors: names and shapes fit")
    assert error.endswith(": pass --arch timm:NAME")
    assert all(f" {n}," in error or f" {n}:" in error for n in [name, *others])
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.safetensors"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"w.safetensors": b""}, "w.safetensors: not a safetensors file or truncated: it is empty; download it again"),
        ({"w.safetensors": b"garbage" * 9}, "w.safetensors: not a safetensors file or truncated: it has 63 bytes"),
        ({"w.pth": None}, "w.pth: not a PyTorch checkpoint, or truncated; download it again"),
        ({"folder/README.md": b""}, "folder: no weights: expected model.safetensors"),
        ({"folder/a.pth": b"", "folder/b.pth": b""}, "folder: 2 weight files, a.pth, b.pth: pass one of them"),
    ],
    ids=["empty", "corrupt", "cut", "no weights", "two"],
)
def test_the_command_says_in_one_line_what_cannot_be_identified(
    files: dict[str, bytes | None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.zeros(40_000)}, tmp_path / "whole.pth")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "whole.pth").read_bytes()[:80_000] if content is None else content)
    status, out, err = command(capsys, "identify", tmp_path / next(iter(files)).partition("/")[0])
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in err


def test_the_document_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "identify", write(state_of(UNIQUE), tmp_path / "w.safetensors"), "--json", "-")
    document = json.loads(out)
    assert (status, document["command"], document["arch"], document["exit_status"]) == (
        0,
        "identify",
        "timm:test_vit",
        0,
    )
    assert document["exact"][0]["num_classes"] == 1000
    path = write({n: t for n, t in state_of(UNIQUE).items() if n != "norm.bias"}, tmp_path / "w.safetensors")
    status, out, _ = command(capsys, "identify", path, "--json", "-")
    document = json.loads(out)
    assert (status, document["arch"], document["exit_status"]) == (2, None, 2)
    assert document["nearest"][0]["missing"] == ["norm.bias"]


def test_the_command_shows_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(state_of(UNIQUE, img_size=320), tmp_path / "w.safetensors")
    status, out, _ = command(capsys, "identify", path)
    assert status == 2
    assert "test_vit fits exactly with img_size=320" in out
    assert "1 other shape" in out
    status, _, err = command(capsys, "identify", tmp_path / "nothing.safetensors")
    assert status == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
