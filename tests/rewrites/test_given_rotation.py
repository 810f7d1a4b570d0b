"""`rotate --rotation FILE`: the basis that the user chose, recorded by its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.files.digest import sha256
from normconvert.options import Options
from normconvert.plan.rotations import rotated
from normconvert.recipes.job import Job
from tests.support.basis_models import built, logits

D = 48


def written(path: Path, size: int = D, *, constant: bool = False, seed: int = 5) -> Path:
    torch.save(rotated(torch.eye(size, dtype=torch.float64), 0, "random", seed, constant), path)
    return path


def saved(folder: Path, name: str) -> Path:
    built(name).save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_the_output_is_the_original_in_that_basis_and_the_record_says_which(tmp_path: Path) -> None:
    source, file = saved(tmp_path / "model", "llama"), written(tmp_path / "Q.pt")
    out = tmp_path / "out"
    report = normconvert.convert(source, out, "rotate", rotation=str(file), values=True, verify_level="quick")
    assert report.fidelity is not None
    assert report.fidelity.passed
    table: Tensor = torch.load(file) @ load_file(source / "model.safetensors")["model.embed_tokens.weight"].double().T
    stored = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(stored, table.T.float(), rtol=0, atol=1e-6)
    record = json.loads((out / "normconvert.json").read_text())
    assert record["options"]["rotation"] == f"Q.pt sha256:{sha256(file)}"
    assert str(tmp_path) not in json.dumps(record)
    rows = [row for rows in record["plan"]["tensors"].values() for row in rows if row["op"] == "rotate"]
    # A head has another width than the streams: its own map is a Hadamard matrix.
    assert {row["kind"] for row in rows} == {f"sha256:{sha256(file)}", "hadamard"}
    check_tells(out, source, file, written(tmp_path / "other.pt", seed=6))


def check_tells(out: Path, source: Path, file: Path, other: Path) -> None:
    with pytest.raises(InputError, match=r"rotated by the matrix of Q.pt sha256:.*: say where with --rotation"):
        normconvert.check(out, source)
    assert normconvert.check(out, source, rotation=str(file)).passed
    (found,) = normconvert.check(out, source, rotation=str(other)).findings
    assert found.name == "options.rotation"
    assert "other.pt is sha256:" in found.what
    assert normconvert.verify(source, out, rotation=str(file), level="quick").passed


def test_layernorms_ask_for_a_rotation_that_keeps_the_mean(tmp_path: Path) -> None:
    model = built("gpt2").double()
    with pytest.raises(InputError, match=r"free.pt: Q 1 is .* from 1, at most 0.0039: `transformer.h.0.ln_1` is a"):
        normconvert.convert_model(model, "rotate", rotation=str(written(tmp_path / "free.pt")))
    kept = written(tmp_path / "kept.pt", constant=True)
    result, report = normconvert.convert_model(model, "rotate", rotation=str(kept), verify="quick")
    assert len(report.plan.converted) == 5
    expected = logits(model)
    assert float((logits(result) - expected).norm() / expected.norm()) < 1e-13
    plan = report.plan.to_json()
    again = normconvert.apply_plan(model.state_dict(), normconvert.Plan.from_json(plan), rotation=kept)
    torch.testing.assert_close(again["transformer.wte.weight"], result.state_dict()["transformer.wte.weight"])


class TwoStreams(nn.Module):
    """Two models of different widths side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = (
            nn.Sequential(nn.Embedding(7, size), nn.RMSNorm(size, eps=1e-5), nn.Linear(size, 5)) for size in (8, 12)
        )

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.narrow(ids) + self.wide(ids)
        return y


def test_another_width_is_refused_and_a_stream_of_another_width_stays(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "llama")
    with pytest.raises(InputError, match=r"Q.pt: holds a matrix of 32 channels, and the streams .* have 48"):
        normconvert.inspect(source, "rotate", rotation=str(written(tmp_path / "Q.pt", 32)))
    model = TwoStreams()
    result, report = normconvert.convert_model(
        model, "rotate", example_inputs=(torch.tensor([[1, 2, 3]]),), rotation=str(written(tmp_path / "Q.pt", 12))
    )
    stays = {v.path: v.reason for v in report.plan.kept}
    reason = "its stream stays as it is: it has 8 channels, and Q.pt is a matrix of 12."
    assert stays == {"narrow.1": f"it reads no residual stream, and {reason}"}
    before, after = model.state_dict(), result.state_dict()
    assert torch.equal(after["narrow.0.weight"], before["narrow.0.weight"])
    assert not torch.equal(after["wide.0.weight"], before["wide.0.weight"])


@pytest.mark.parametrize("rotation", ["hadamrd", "nowhere.pt"])
def test_the_command_refuses_in_one_line(tmp_path: Path, rotation: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["rotate", "demo:gpt2", str(tmp_path / "out"), "--rotation", rotation]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    expected = {"hadamrd": "unknown rotation 'hadamrd'; expected hadamard, random or a file"}
    assert error[0].removeprefix("error: ").startswith(expected.get(rotation, "nowhere.pt: no such file"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_notices_another_matrix_in_the_file(tmp_path: Path) -> None:
    def settings(file: Path) -> dict[str, Any]:
        return Job("s", "n", "v", "/o", "w", "rotate", {"rotation": str(file)}).settings

    file = written(tmp_path / "Q.pt")
    before = settings(file)
    assert before["rotation"] == f"Q.pt sha256:{sha256(file)}"
    assert settings(written(file, seed=6)) != before
    Options(rotation=before["rotation"]).check()
