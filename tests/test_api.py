"""The Python API end to end: convert, inspect, verify, load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import normconvert
from normconvert.errors import InputError, NothingToConvert
from tests.support.tiny_checkpoints import contents, gpt2, save, save_vit, vit


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt2(), tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[normconvert.Report, Path]:
    out = tmp_path_factory.mktemp("api") / "out"
    return normconvert.convert(source, out), out


def test_convert_reports_what_it_did(converted: tuple[normconvert.Report, Path]) -> None:
    report, out = converted
    assert (report.converted, report.total) == (5, 5)
    assert report.out == str(out)
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert report.fidelity.algebra <= 1e-10
    assert set(report.seconds) == {"open", "trace", "write", "verify"}
    assert report.bytes_written == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    json.dumps(report.to_json(), allow_nan=False)


def test_the_functions_are_there_whatever_was_imported_before(
    source: Path, converted: tuple[normconvert.Report, Path]
) -> None:
    """A submodule of the same name would take the function's place."""
    _, out = converted
    import normconvert.verification.equivalence

    assert normconvert.verify(source, out).passed
    assert callable(normconvert.convert)
    assert callable(normconvert.inspect)


def test_load_gives_the_same_function_with_rmsnorms(source: Path, converted: tuple[normconvert.Report, Path]) -> None:
    from normconvert.sources import open_source

    _, out = converted
    model: Any = normconvert.load(out, dtype=torch.float64)
    original: Any = open_source(str(source)).load(dtype=torch.float64)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert "RMSNorm" in repr(model)
    assert "RMSNorm" not in repr(original)


def test_two_conversions_are_the_same_bytes_and_leave_the_source_alone(tmp_path: Path) -> None:
    model = save_vit(vit(), tmp_path / "vit")
    before = contents(model)
    # The card's lines have the folder's name.
    for parent in (tmp_path / "a", tmp_path / "b"):
        parent.mkdir()
        normconvert.convert(model, parent / "out")
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")
    assert contents(model) == before


def test_the_record_holds_no_times_and_no_paths(source: Path, converted: tuple[normconvert.Report, Path]) -> None:
    text = (converted[1] / "normconvert.json").read_text(encoding="utf-8")
    assert "seconds" not in text
    assert str(source.parent) not in text
    assert json.loads(text)["verification"]["passed"] is True


def test_a_dry_run_and_an_inspection_write_nothing(source: Path, tmp_path: Path) -> None:
    dry = normconvert.convert(source, tmp_path / "out", dry_run=True)
    seen = normconvert.inspect(source)
    assert dry.plan == seen.plan
    assert dry.out is None
    assert list(tmp_path.iterdir()) == []


def test_without_verification_there_are_no_figures(source: Path, tmp_path: Path) -> None:
    report = normconvert.convert(source, tmp_path / "out", verify=False)
    assert report.fidelity is None
    assert json.loads((tmp_path / "out" / "normconvert.json").read_text())["verification"] is None
    assert "not verified" in (tmp_path / "out" / "README.md").read_text()


def test_an_output_that_exists_is_replaced_only_on_request(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        normconvert.convert(source, out, verify=False)
    # What somebody else keeps there is not replaced even then.
    with pytest.raises(InputError, match="was not made by normconvert"):
        normconvert.convert(source, out, verify=False, overwrite=True)
    assert contents(out) == {"precious.txt": b"mine"}
    made = tmp_path / "made"
    normconvert.convert(source, made, verify=False)
    (made / "note.txt").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        normconvert.convert(source, made, verify=False)
    normconvert.convert(source, made, verify=False, overwrite=True)
    assert "note.txt" not in contents(made)
    assert (made / "normconvert.json").is_file()


def test_another_dtype_is_stored_and_reported(source: Path, tmp_path: Path) -> None:
    report = normconvert.convert(source, tmp_path / "out", dtype="bfloat16")
    assert (report.dtype, report.stored) == ("float32", "bfloat16")
    assert report.fidelity is not None
    assert report.fidelity.rounding is not None
    assert report.fidelity.rounding <= 2
    assert next(normconvert.load(tmp_path / "out").parameters()).dtype == torch.bfloat16


def test_nothing_to_convert_carries_the_report(source: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = save(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), tmp_path / "llama")
    with pytest.raises(NothingToConvert, match="nothing to do") as caught:
        normconvert.convert(llama, tmp_path / "out")
    assert vars(caught.value)["report"].total == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"dtype": "int8"}, "dtype"),
        ({"tied": "both"}, "tied"),
        ({"min_gain": 0}, "min_gain"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_an_unknown_option_value_is_named(options: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        normconvert.convert(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
