"""A checkpoint with model code of its own loads as converted, and every line that says how to load it works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normconvert
from normconvert.errors import InputError
from normconvert.report.loading import how_to_load
from normconvert.result import Report
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import gpt2, save

CODE = "from transformers import {base}\nclass {name}({base}):\n    pass\n"
RUN = """
import sys, torch, transformers, normconvert
inputs = torch.load(sys.argv[1])
lines = sys.argv[2:]
found = []
for line in lines:
    name = line.split("=")[1].split(".")[0].strip()
    exec(line, scope := {name: normconvert if name == "normconvert" else getattr(transformers, name)})
    model = scope["model"]
    with torch.no_grad():
        logits = model.eval()(inputs).logits
    kinds = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
    found.append([kinds, logits])
torch.save(found, sys.argv[1])
"""


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return perturb(ResNetForImageClassification(config).eval())


def own(model: nn.Module, folder: Path) -> Path:
    """The model's checkpoint, whose class ``Mine`` is in a file beside it."""
    save(model, folder)
    base = type(model).__name__
    (folder / "mine.py").write_text(CODE.format(base=base, name="Mine"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Mine"], "auto_map": {auto_class(base): "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def auto_class(name: str) -> str:
    return "AutoModelForCausalLM" if "LM" in name else "AutoModelForImageClassification"


def run(lines: list[str], inputs: torch.Tensor, folder: Path) -> list[tuple[list[str], torch.Tensor]]:
    """What each line loads in a fresh process: the norms and the logits."""
    file = folder / "exchanged.pt"
    torch.save(inputs, file)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file), *lines],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[list[str], torch.Tensor]] = torch.load(file)
    return found


def card_lines(report: Report) -> list[str]:
    """The lines of the card that load a model, as they stand there: to be run beside the folder."""
    text = (Path(str(report.out)) / "README.md").read_text()
    return re.findall(r"^model = .*$", text, re.MULTILINE)


METHODS: dict[str, tuple[Any, Any, list[list[str]]]] = {
    "rmsnorm": (gpt2, torch.arange(12).reshape(2, 6), [["RMSNorm"], ["LayerNorm"]]),
    "crmsnorm": (gpt2, torch.arange(12).reshape(2, 6), [["CRMSNorm"]]),
    "fuse-bn": (resnet, torch.randn(1, 3, 32, 32), [[]]),
}


@pytest.fixture(autouse=True)
def _module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code is copied to a cache before it runs; not into the user's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("method", ["rmsnorm", *(pytest.param(m, marks=pytest.mark.slow) for m in [*METHODS][1:])])
def test_every_line_that_is_printed_loads_what_it_says(tmp_path: Path, method: str) -> None:
    make, inputs, norms = METHODS[method]
    model = make()
    report = normconvert.convert(own(model, tmp_path / "src"), tmp_path / "out", method=method, trust_remote_code=True)
    assert how_to_load(report)[0] == f'model = normconvert.load("{tmp_path / "out"}", trust_remote_code=True)'
    with torch.no_grad():
        truth = model(inputs).logits
    lines = [*how_to_load(report), *card_lines(report)]
    found = run(lines, inputs, tmp_path)
    assert [kinds for kinds, _ in found] == norms * 2
    for line, (kinds, logits) in zip(lines, found, strict=True):
        assert float((logits - truth).norm() / truth.norm()) < 1e-5
        assert (kinds == ["LayerNorm"]) == line.endswith("# the original architecture")
    with pytest.raises(InputError, match="trust-remote-code"):
        normconvert.load(tmp_path / "out")


@pytest.mark.parametrize("method", ["rmsnorm", pytest.param("crmsnorm", marks=pytest.mark.slow)])
def test_a_class_of_transformers_with_code_beside_it_stays_that_class(tmp_path: Path, method: str) -> None:
    """Its conversion was proved; the checkpoint's class of the same name was neither read nor run."""
    make, inputs, norms = METHODS[method]
    model = make()
    source = save(model, tmp_path / "src")
    name = type(model).__name__
    (source / "mine.py").write_text("raise SystemExit('not to be run')\n")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {auto_class(name): f"mine.{name}"}}))
    report = normconvert.convert(source, tmp_path / "out", method=method)
    with torch.no_grad():
        truth = model(inputs).logits
        trusted = normconvert.load(tmp_path / "out", trust_remote_code=True)(inputs).logits
    assert float((trusted - truth).norm() / truth.norm()) < 1e-5
    lines = [*how_to_load(report), *card_lines(report)]
    found = run(lines, inputs, tmp_path)
    # The code beside it is left behind, so that trust_remote_code runs the shipped file.
    assert [kinds for kinds, _ in found] == [
        ["LayerNorm"] if line.endswith("# the original architecture") else norms[0] for line in lines
    ]
    assert any("trust_remote_code" in line for line in lines)
    assert not (tmp_path / "out" / "mine.py").exists()
    assert all(float((logits - truth).norm() / truth.norm()) < 1e-5 for _, logits in found)
