"""What somebody could do to an output and its record so that it passes: each is found."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import normconvert
from normconvert.errors import InputError
from normconvert.files.embedded import demo_folder
from normconvert.verification import record_check
from normconvert.verification.record_check import check
from tests.support.tiny_checkpoints import gpt2, save

RECORD = "normconvert.json"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, its conversion)."""
    root = tmp_path_factory.mktemp("attacks")
    source = save(gpt2(), root / "source")
    normconvert.convert(source, root / "out")
    return source, root / "out"


@pytest.fixture
def out(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "out"))


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((out / RECORD).read_text())
    change(record)
    (out / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def scale(out: Path) -> None:
    """Other weights, and a plan that leads to them."""
    name = "transformer.h.0.mlp.c_fc.weight"
    state = load_file(out / "model.safetensors")
    state[name] = state[name] * 2
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    by = {"op": "scale", "by": {"value": 2.0}, "axis": 1}
    edit(out, lambda r: r["plan"]["tensors"].update({name: [by]}))


def _one_quick(rows: dict[str, Callable[[dict[str, Any]], object]]) -> list[Any]:
    """The rows as parameters: each traces a model three times, so all but the first are slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(rows)]


ATTACKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another torch": lambda r: r["versions"].update(torch="2.0"),
    "another normconvert": lambda r: r.update(normconvert="0.0"),
    "a method that learns": lambda r: r.update(method="swap un"),
    "the plan's too": lambda r: (r.update(method="swap un"), r["plan"].update(method="swap un")),
    "an unknown method": lambda r: r.update(method="x"),
    "another method": lambda r: r.update(method="fuse-bn"),
}


@pytest.mark.parametrize("attack", _one_quick(ATTACKS))
def test_no_record_makes_tampered_weights_pass(pair: tuple[Path, Path], out: Path, attack: str) -> None:
    scale(out)
    edit(out, ATTACKS[attack])
    assert check(out, pair[0]).findings


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "more edits to load with": lambda r: r.update(modules=[*r["plan"]["modules"], {"op": "absorb", "path": "x"}]),
    "a class": lambda r: r["plan"]["classes"].append("GPT2ForTokenClassification"),
    "a verdict": lambda r: r["plan"]["verdicts"][0].update(converted=False),
    "figures": lambda r: r["verification"].update(algebra=1.0),
    "tolerance": lambda r: r["verification"].update(tolerance=1.0),
    "not passed": lambda r: r["verification"].update(passed=False),
    "a figure's name": lambda r: r["verification"].update(leve=r["verification"].pop("level")),
    "no figures": lambda r: r.update(verification={"a": 1}),
    "an option": lambda r: r["options"].update(basis="none"),
    "an option more": lambda r: r["options"].update(evil=True),
    "dtype": lambda r: r["options"].update(dtype="float99"),
    "hash": lambda r: r["source"]["sha256"].pop("config.json"),
    "a key more": lambda r: r.update(evil=1),
    "library": lambda r: r.update(library="timm"),
    "architecture": lambda r: r.update(architecture="GPT2Model"),
}


@pytest.mark.parametrize("name", _one_quick(EDITS))
def test_every_edited_record_is_seen(pair: tuple[Path, Path], out: Path, name: str) -> None:
    edit(out, EDITS[name])
    assert check(out, pair[0]).findings


def test_figures_that_could_have_appeared_are_measured_again(pair: tuple[Path, Path], out: Path) -> None:
    edit(out, lambda r: r["verification"].update(rounding=0.01))
    report = check(out, pair[0])
    assert report.passed
    assert report.notes == ("README.md was edited since the conversion",)  # its figures are no more the record's
    (finding,) = check(out, pair[0], measure=True).findings
    assert finding.name == "verification.rounding"
    assert finding.what.startswith("is 0.01, measured ")


@pytest.mark.slow
def test_figures_that_nobody_edited_are_measured_as_they_were(pair: tuple[Path, Path], out: Path) -> None:
    assert check(pair[1], pair[0], measure=True).notes == ()
    edit(out, lambda r: r["verification"]["probes"][0].update(algebra=0.0))
    assert any("rows of probes" in note for note in check(out, pair[0], measure=True).notes)
    edit(out, lambda r: r.update(verification=None))
    assert [finding.name for finding in check(out, pair[0], measure=True).findings] == ["verification"]


def test_a_library_that_the_record_names_is_not_imported(
    pair: tuple[Path, Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(out, lambda r: (r.update(library="evil"), r["versions"].update(evil="1")))
    with pytest.raises(InputError, match="not a conversion record"):
        check(out, pair[0])
    edit(out, lambda r: r.update(library="transformers"))
    check(out, pair[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".cache/x", "__pycache__/y.pyc", "sub/README.md", "sub/normconvert.json", ".env"])
def test_every_further_file_is_seen(pair: tuple[Path, Path], out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    (out / "link").symlink_to("/")
    assert {finding.name for finding in check(out, pair[0]).findings} == {name, "link"}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(modules=[7]),
        lambda r: r.update(options=[]),
        lambda r: r["options"].update(arch=7),
        lambda r: r["options"].update(min_gain={"a": 1}),
        lambda r: r.update(plan=[]),
        lambda r: r.update(source="x"),
        lambda r: r["source"].update(sha256=[1]),
        lambda r: r["plan"].update(modules={}),
        lambda r: r.update(versions=1),
        lambda r: r.update(verification=[1]),
        lambda r: r.update(format="1"),
    ],
)
def test_a_record_of_other_types_is_bad_input(
    pair: tuple[Path, Path], out: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(out, change)
    with pytest.raises(InputError):
        check(out, pair[0])


def flips(out: Path, count: int, seed: int) -> list[tuple[Path, int]]:
    """Places of single bits over all files, every file at least once."""
    draw = random.Random(seed)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    chosen = [*files, *draw.choices(files, k=count - len(files))]
    return [(path, draw.randrange(8 * path.stat().st_size)) for path in chosen]


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def _flipped_and_checked(source: Path, out: Path, count: int, seed: int) -> list[str]:
    """The flips that were not seen."""
    unseen = []
    for path, at in flips(out, count, seed):
        _flip(path, at)
        try:
            report = check(out, source)
            named = [f.sentence for f in report.findings] + list(report.notes)
        except InputError as error:
            named = [str(error)]
        if not any(path.name in text for text in named):
            unseen.append(f"{path.name} bit {at}: {named}")
        _flip(path, at)
    return unseen


def _planned_once(plan: Callable[..., Any]) -> Callable[..., Any]:
    """The same, tracing the one source once for each method and options: most of a check's time."""
    known: dict[str, Any] = {}

    def again(source: Any, record: dict[str, Any]) -> Any:
        key = json.dumps([record["method"], record["options"]])
        if key not in known:
            known[key] = plan(source, record)
        return known[key]

    return again


def test_single_bits_are_seen(pair: tuple[Path, Path], out: Path) -> None:
    torch.manual_seed(0)
    assert _flipped_and_checked(pair[0], out, 3, 0) == []
    assert check(out, pair[0]).passed


@pytest.mark.slow
def test_two_hundred_single_bits_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(record_check, "_plan_again", _planned_once(record_check._plan_again))
    normconvert.convert("demo:gpt2", out)
    names = {"tokenizer.json", "config.json", "README.md", RECORD, "modeling_normconvert.py", "model.safetensors"}
    assert names < {path.name for path in out.iterdir()}
    assert _flipped_and_checked(demo_folder("gpt2"), out, 200, 1) == []
