"""The lines that load an output are true as they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import normconvert
from normconvert.cli import run
from normconvert.report.loading import how_to_load
from tests.support.tiny_checkpoints import gpt2, save, save_vit, vit


def model_of(line: str) -> nn.Module:
    names: dict[str, object] = {}
    exec(f"import normconvert, timm\nfrom transformers import *\n{line}", names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.slow
def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    out = tmp_path / 'a "quoted" \\ näme'
    report = normconvert.convert(save(gpt2(), tmp_path / "src"), out, verify=False)
    ids = torch.tensor([[1, 2, 3]])
    results = [model_of(line).eval()(ids).logits for line in how_to_load(report)[:1]]
    assert torch.equal(results[0], normconvert.load(out)(ids).logits)


def test_a_swap_says_how_its_output_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["swap", "un", "demo:vit", str(out), "--data", "demo:", "--calibrate-only", "--calibration", "32"]
    assert run(asked) == 0
    printed = capfd.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(printed) if line.startswith("  load it"))
    lines = [line[line.index("model = ") :] for line in printed[at:] if "model = " in line]
    assert lines
    for line in lines:
        assert not any(isinstance(module, nn.LayerNorm) for module in model_of(line).modules())


def test_timm_has_no_line_where_its_own_norms_have_another_eps(tmp_path: Path) -> None:
    source = save_vit(vit(), tmp_path / "src")
    report = normconvert.convert(source, tmp_path / "out", "scale", power="4", verify_level="quick")
    assert any("takes the old one" in note for note in report.notes)
    assert not any("create_model" in line for line in how_to_load(report))
    assert "timm.create_model" not in (tmp_path / "out" / "README.md").read_text()
