"""The tool that says whether a refactoring changed an output: what it finds, and what it passes over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.census import output_hashes
from tools.census.normalised import different_paths, folder_record, normalised, same_figure

ROW = "opt-tied"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this version writes for one checkpoint."""
    file = tmp_path_factory.mktemp("hashes") / "before.json"
    assert output_hashes.main(["--write", str(file), "--only", ROW]) == 0
    return file


@pytest.fixture(scope="module")
def now(before: Path) -> Record:
    """The same made a second time, from the start."""
    return output_hashes.records([ROW])


def changed(before: Path, now: Record, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    return output_hashes.compare(json.loads(before.read_text()), now), capsys.readouterr().out


def copy_of(now: Record, method: str = "rmsnorm") -> tuple[Record, Record]:
    """A record that may be changed, and its part on one conversion."""
    copied = json.loads(json.dumps(now))
    return copied, copied["rows"][ROW]["methods"][method]


@pytest.mark.slow
def test_the_same_version_gives_the_same(before: Path, now: Record, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = changed(before, now, capsys)
    assert (status, "differs" in printed) == (0, False), printed
    assert "5 of 5 outputs and refusals are the same" in printed
    assert "shipped code: unchanged" in printed


def test_conversions_write_different_files(now: Record) -> None:
    weights = [
        tuple(v for k, v in outcome["files"].items() if k.startswith("model"))
        for outcome in now["rows"][ROW]["methods"].values()
    ]
    assert len(set(weights)) == len(weights) == 5


def test_weights_that_differ_are_named(before: Path, now: Record, capsys: pytest.CaptureFixture[str]) -> None:
    other, outcome = copy_of(now, "crmsnorm paper")
    outcome["files"]["model.safetensors"] = "0" * 64
    status, printed = changed(before, other, capsys)
    assert status == 1
    assert f"{ROW}, crmsnorm paper:\n  model.safetensors: " in printed
    assert "4 of 5" in printed


def test_a_value_of_the_record_that_differs_is_named(
    before: Path, now: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    other, outcome = copy_of(now)
    outcome["files"]["normconvert.json"] = "0" * 64
    outcome["contents"]["normconvert.json"]["plan"]["format"] = 2
    status, printed = changed(before, other, capsys)
    assert status == 1
    assert "normconvert.json $.plan.format: 1, now 2" in printed


def test_what_the_call_returns_counts(before: Path, now: Record, capsys: pytest.CaptureFixture[str]) -> None:
    other, outcome = copy_of(now)
    outcome["contents"]["(report)"]["tensors_edited"] += 1
    status, printed = changed(before, other, capsys)
    assert (status, "(report) $.tensors_edited: " in printed) == (1, True)


def test_a_refusal_where_there_was_none_is_a_difference(
    before: Path, now: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    other, _ = copy_of(now)
    other["rows"][ROW]["methods"]["rmsnorm"] = {"refused": "NothingToConvert: none"}
    status, printed = changed(before, other, capsys)
    assert (status, "now: NothingToConvert: none" in printed) == (1, True)


def test_shipped_code_is_reported_and_is_no_difference(
    before: Path, now: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    other, outcome = copy_of(now)
    assert list(outcome["shipped_code"]) == ["modeling_normconvert.py"]
    assert "modeling_normconvert.py" not in outcome["files"]
    outcome["shipped_code"]["modeling_normconvert.py"] = "0" * 64
    status, printed = changed(before, other, capsys)
    assert (status, "shipped code: changed: modeling_normconvert.py" in printed) == (0, True)


def test_times_versions_and_noise_are_passed_over_and_nothing_else() -> None:
    record = {
        "normconvert": "0.1.0", "format": 1, "seconds": {"open": 1.0}, "versions": {"torch": "2.9"},
        "verification": {"algebra": 3e-16, "kl": -1e-13, "tolerance": 1e-10, "probes": [{"original_error": 2e-7}]},
        "plan": {"rounding": 1.0, "out": "/tmp/abc/converted"},
    }  # fmt: skip
    content, figures = normalised(record, "/tmp/abc")
    assert figures == {"$.verification.algebra": 3e-16, "$.verification.probes[0].original_error": 2e-7}
    assert content["plan"] == {"rounding": 1.0, "out": "/converted"}
    assert content["verification"]["tolerance"] == 1e-10
    other = {**record, "normconvert": "0.2.0", "seconds": {"open": 2.0}, "versions": {"torch": "2.10"}}
    other["verification"] = {**record["verification"], "kl": 2e-13}  # type: ignore[dict-item]
    assert list(different_paths(content, normalised(other, "/tmp/abc")[0])) == []
    assert list(different_paths(content, normalised({**record, "format": 2}, "/tmp/abc")[0])) == ["$.format: 1, now 2"]


def test_an_error_that_is_gone_is_a_difference() -> None:
    assert same_figure(3e-16, 5e-16)
    assert not same_figure(3e-16, 0.0)
    assert not same_figure(3e-16, 1e-12)
    assert not same_figure(3e-16, None)


def test_a_card_counts_but_for_its_figures(tmp_path: Path) -> None:
    card = "# Title\n\n## Fidelity\n\n| rounding | 0.986 times |\n\n## Notes\n\n- 9 norms\n"
    records = []
    for text in (card, card.replace("0.986", "1.1"), card.replace("9 norms", "8 norms")):
        (tmp_path / "README.md").write_text(text)
        records.append(folder_record(tmp_path, "", {})["files"])
    assert records[0] == records[1] != records[2]
