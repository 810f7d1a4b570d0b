"""``normconvert check``: a tampered or stale output fails, and what was changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.verification.folder_comparison import compare_data, compare_folders
from normconvert.verification.record_check import CheckReport, check
from tests.support.tiny_checkpoints import VIT_ARGUMENTS, contents, gpt2, gpt2_without_head, save, save_vit, vit

SHARDS = [f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
RECORD = "normconvert.json"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source in shards, its conversion), verified as usual, so that its card has figures.

    Without a head, which would double the time of each check; `with_head` has one.
    """
    return converted(gpt2_without_head(), tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with a tied head: another class opens these files, too."""
    return converted(gpt2(), tmp_path_factory.mktemp("check"))


def converted(model: nn.Module, root: Path) -> tuple[Path, Path]:
    source = save(model, root / "tiny-gpt2", "sharded")
    (source / "labels.txt").write_text("a\nb\n")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    normconvert.convert(source, root / "out")
    return source, root / "out"


@pytest.fixture
def copies(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Both to be spoilt."""
    for folder in pair:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / pair[0].name, tmp_path / pair[1].name


def flip(file: Path, tensor: str, at: int = 0) -> None:
    """Change one bit of one byte of a tensor: the least that can be changed."""
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"]
    assert at < end - start
    raw[8 + length + start + at] ^= 1
    file.write_bytes(bytes(raw))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def found(report: CheckReport) -> dict[str, str]:
    """Subject -> what is wrong."""
    return {finding.subject: finding.what for finding in report.findings}


def test_a_conversion_passes_and_nothing_is_touched(with_head: tuple[Path, Path]) -> None:
    source, out = with_head
    before = contents(source), contents(out)
    report = check(out, source)
    assert report.findings == ()
    assert report.notes == ()  # the model card too is made again to the byte, figures and all
    assert report.files == len(before[1])
    assert (contents(source), contents(out)) == before
    assert check(out / RECORD, source).passed


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"max_shard_size": 50_000}, {"fold": True}, {"tied": "untie"}]
)
def test_the_record_knows_how_it_was_converted(
    with_head: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    normconvert.convert(with_head[0], tmp_path / "out", verify=False, **options)
    assert check(tmp_path / "out", with_head[0]).findings == ()


def test_a_converted_file_without_a_folder_passes(tmp_path: Path) -> None:
    """Bare weights of timm: the record knows the architecture that the user named."""
    folder = save_vit(vit(), tmp_path / "vit", VIT_ARGUMENTS)
    normconvert.convert(folder, tmp_path / "out", verify=False)
    assert check(tmp_path / "out", folder).findings == ()
    flip(tmp_path / "out" / "model.safetensors", "blocks.0.norm1.weight")
    assert list(found(check(tmp_path / "out", folder))) == ["blocks.0.norm1.weight in model.safetensors"]


def shard_of(folder: Path, tensor: str) -> Path:
    name = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]
    return folder / name


EDITED, COPIED = "h.0.attn.c_proj.weight", "h.0.attn.c_attn.weight"


@pytest.mark.parametrize("tensor", [EDITED, COPIED])
def test_one_flipped_bit_names_the_tensor(copies: tuple[Path, Path], tensor: str) -> None:
    source, out = copies
    file = shard_of(out, tensor)
    flip(file, tensor, at=4 * 50 + 3)
    ((subject, what),) = found(check(out, source)).items()
    assert subject == f"{tensor} in {file.name}"
    columns = load_file(file)[tensor].shape[1]
    assert what.startswith("differs in 1 of ")
    assert what.endswith(f"first at [{50 // columns}, {50 % columns}]")


def test_a_changed_config_value_names_the_key(copies: tuple[Path, Path]) -> None:
    source, out = copies
    edit(out / "config.json", lambda c: c.update(layer_norm_epsilon=1e-3))
    edit(out / "config.json", lambda c: c["normconvert"]["modules"][0].update(axis=1))
    assert found(check(out, source)) == {
        "layer_norm_epsilon in config.json": "is 0.001, expected 1e-05",
        "normconvert.modules.0.axis in config.json": "is 1, expected -1",
    }


def test_swapped_shards_are_named(copies: tuple[Path, Path]) -> None:
    source, out = copies
    a, b = out / SHARDS[1], out / SHARDS[2]
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)
    assert found(check(out, source)) == {
        SHARDS[1]: f"holds what belongs into {SHARDS[2]}: the files are swapped",
        SHARDS[2]: f"holds what belongs into {SHARDS[1]}: the files are swapped",
    }


def test_a_shard_of_another_checkpoint_is_named(copies: tuple[Path, Path]) -> None:
    source, out = copies
    state = {name: value + 1.0 for name, value in load_file(out / SHARDS[2]).items()}
    assert len(state) > 1
    save_file(state, out / SHARDS[2], metadata={"format": "pt"})
    ((subject, what),) = found(check(out, source)).items()
    assert subject == SHARDS[2]
    assert "another checkpoint's" in what
    assert f"every one of its {len(state)} tensors" in what


def test_the_unconverted_shard_in_its_place_is_named(copies: tuple[Path, Path]) -> None:
    """A shard of the source has the same names and shapes; only what was edited differs."""
    source, out = copies
    file = shard_of(out, EDITED)
    shutil.copy(source / file.name, file)
    assert f"{EDITED} in {file.name}" in found(check(out, source))


def truncate(out: Path) -> None:
    (out / SHARDS[0]).write_bytes((out / SHARDS[0]).read_bytes()[:-4])


def drop_tensor(out: Path) -> None:
    state = load_file(out / SHARDS[2])
    del state[sorted(state)[0]]
    save_file(state, out / SHARDS[2], metadata={"format": "pt"})


SPOILS: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("truncated", truncate, SHARDS[0], "cannot be read"),
    ("missing shard", lambda out: (out / SHARDS[3]).unlink(), SHARDS[3], "is missing"),
    ("tensor gone", drop_tensor, SHARDS[2], "is missing"),
    ("more weights", lambda out: (out / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin", "not a file of"),
    (
        "code",
        lambda out: (out / "modeling_normconvert.py").write_text("import os\n"),
        "modeling_normconvert.py",
        "differs",
    ),
    ("more code", lambda out: (out / "custom_generate.py").write_text("1\n"), "custom_generate.py", "not a file of"),
    ("labels", lambda out: (out / "labels.txt").write_text("b\na\n"), "labels.txt", "differs"),
    (
        "no JSON",
        lambda out: (out / "generation_config.json").write_text("{"),
        "generation_config.json",
        "not valid JSON",
    ),
    (
        "index",
        lambda out: edit(out / "model.safetensors.index.json", lambda i: i["weight_map"].update({EDITED: SHARDS[0]})),
        f"weight_map.{EDITED} in model.safetensors.index.json",
        "expected",
    ),
    (
        "form",
        lambda out: (out / "config.json").write_text((out / "config.json").read_text().replace("\n", "")),
        "config.json",
        "another form",
    ),
]


@pytest.mark.parametrize(("spoil", "subject", "words"), [row[1:] for row in SPOILS], ids=[row[0] for row in SPOILS])
def test_whatever_is_changed_is_named(
    pair: tuple[Path, Path], copies: tuple[Path, Path], spoil: Callable[[Path], object], subject: str, words: str
) -> None:
    right, out = pair[1], copies[1]
    spoil(out)
    findings = {f.subject: f.what for f in compare_folders(right, out, [RECORD])}
    assert any(subject in key and words in what for key, what in findings.items()), findings


def test_a_changed_plan_is_named_even_where_no_byte_of_the_weights_shows_it(copies: tuple[Path, Path]) -> None:
    source, out = copies
    edit(out / RECORD, lambda r: r["plan"]["modules"][1].update(eps=0.5))
    findings = found(check(out, source))
    assert findings[f"plan.modules.1.eps in {RECORD}"] == "is 0.5, expected 1e-05"
    edit(out / RECORD, lambda r: r["plan"]["tensors"].pop(EDITED))
    findings = found(check(out, source))
    assert f"plan.tensors.{EDITED} in {RECORD}" in findings
    edit(out / RECORD, lambda r: r["plan"]["tensors"].update(ghost=[{"op": "center", "axis": 0}]))
    # What is written in the folder that is checked is compared, and never done.
    assert "expected no such key" in found(check(out, source))[f"plan.tensors.ghost in {RECORD}"]


def test_a_changed_source_is_named_with_what_it_changes(copies: tuple[Path, Path]) -> None:
    source, out = copies
    file = shard_of(source, COPIED)
    state = load_file(file)
    state[COPIED][0, 0] += 1.0
    save_file(state, file, metadata={"format": "pt"})
    edit(source / "config.json", lambda c: c.update(activation_function="relu"))
    findings = found(check(out, source))
    assert findings[file.name].startswith("of the source changed since the conversion: sha256 ")
    assert findings["config.json"].startswith("of the source changed")
    assert findings[f"{COPIED} in {file.name}"].startswith("differs in 1 of ")
    assert findings["activation_function in config.json"] == 'is "gelu_new", expected "relu"'


def test_an_edited_card_and_ignored_files_are_no_failure(copies: tuple[Path, Path]) -> None:
    source, out = copies
    (out / "README.md").write_text("# Mine\n")
    (out / "notes.txt").write_text("x")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("x")
    report = check(out, source)
    assert list(found(report)) == ["notes.txt"]
    assert report.notes == ("README.md was edited since the conversion", ".git was not compared")
    assert check(out, source, ignore=["*.txt"]).passed
    flip(shard_of(out, EDITED), EDITED)
    assert not check(out, source, ignore=["*"]).passed  # weights cannot be ignored


def test_embedded_models_are_found_by_their_record_and_local_ones_are_asked_for(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["rmsnorm", "demo:vit", str(tmp_path / "vit"), "--no-verify", "-q"]) == 0
    capsys.readouterr()
    assert run(["check", str(tmp_path / "vit")]) == 0
    assert "passed" in capsys.readouterr().out
    assert run(["check", str(pair[1])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "'tiny-gpt2'" in error
    assert "--source" in error
    assert str(pair[0].parent) not in json.loads((pair[1] / RECORD).read_text())["source"]["reference"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: (out / RECORD).unlink(), "nothing to check"),
        (lambda out: shutil.rmtree(out), "no such folder"),
        (lambda out: (out / RECORD).write_text("{"), "not valid JSON"),
        (lambda out: (out / RECORD).write_text("[]"), "expected a JSON object"),
        (lambda out: edit(out / RECORD, lambda r: r.pop("plan")), "not a conversion record (plan: Field required)"),
        (lambda out: edit(out / RECORD, lambda r: r.update(format=9)), "format '9', expected 1"),
    ],
)
def test_what_cannot_be_checked_is_bad_input(
    copies: tuple[Path, Path], spoil: Callable[[Path], object], words: str
) -> None:
    source, out = copies
    spoil(out)
    with pytest.raises(InputError) as caught:
        check(out, source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_before_anything_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A sparse file makes the output larger than any disk here."""
    shutil.copytree(pair[1], tmp_path / "out")
    with (tmp_path / "out" / "huge.bin").open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(InputError, match="set TMPDIR to a larger disk"):
        check(tmp_path / "out", pair[0])


def test_the_command_says_what_is_wrong_for_people_and_for_ci(
    copies: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copies
    file = shard_of(out, EDITED)
    flip(file, EDITED)
    files = {option: tmp_path / f"x.{option}" for option in ("json", "junit", "markdown")}
    arguments = [part for option, path in files.items() for part in (f"--{option}", str(path))]
    assert run(["check", str(out), "--source", str(source), "--github", *arguments]) == 1
    captured = capsys.readouterr()
    assert "failed" in captured.out
    assert f"✗ {EDITED} in {file.name} differs" in " ".join(captured.out.split())
    assert f"::error file={out / file.name},title=normconvert check::{EDITED} in {file.name} differs" in captured.out
    document = json.loads(files["json"].read_text())
    assert (document["exit_status"], document["passed"]) == (1, False)
    assert [f["name"] for f in document["findings"]] == [EDITED]
    assert EDITED in files["junit"].read_text()
    assert f"- `{EDITED} in {file.name}` differs" in files["markdown"].read_text()


def test_values_that_only_a_bitwise_comparison_tells_apart_differ(tmp_path: Path) -> None:
    """0.0 and -0.0 are equal numbers; two NaNs are not. Neither may hide or fake a difference."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    nan = torch.tensor([float("nan"), 0.0, 1.0], dtype=torch.float16)
    save_file({"x": nan, "n": torch.arange(6).reshape(2, 3)}, a / "m.safetensors")
    save_file({"x": nan, "n": torch.arange(6).reshape(2, 3)}, b / "m.safetensors")
    assert list(compare_folders(a, b)) == []
    flip(b / "m.safetensors", "x", at=3)  # the sign's byte of the second value; one bit of it: 0.0 becomes tiny
    flip(b / "m.safetensors", "n", at=8 * 4)
    findings = {f.name: f.what for f in compare_folders(a, b)}
    assert set(findings) == {"m.safetensors"}  # both of its tensors differ
    flip(b / "m.safetensors", "x", at=3)
    findings = {f.name: f.what for f in compare_folders(a, b)}
    assert findings == {"n": "differs in 1 of 6 values, first at [1, 1]"}
    save_file({"x": -nan, "n": torch.arange(6).reshape(2, 3)}, b / "m.safetensors")
    findings = {f.name: f.what for f in compare_folders(a, b)}
    assert findings == {"x": "differs in 3 of 3 values by at most inf, first at [0]"}


def test_json_differences_are_told_key_by_key() -> None:
    a = {"a": {"b": [1, {"c": 2.0}], "d": None}, "e": "x" * 100, "t": True}
    b = {"a": {"b": [1, {"c": 2}], "f": 0}, "e": "y", "t": 1}
    assert dict(compare_data(a, b)) == {
        "a.b.1.c": "is 2, expected 2.0",
        "a.d": "is missing, expected null",
        "a.f": "is 0, expected no such key",
        "e": f'is "y", expected "{"x" * 58}…',
        "t": "is 1, expected true",
    }
