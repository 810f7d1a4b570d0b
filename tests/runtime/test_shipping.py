"""The one file that outputs carry is what the parts of the runtime are, and works alone."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normconvert import runtime
from normconvert.runtime import apply_module_edits
from normconvert.runtime.shipping import PARTS, assemble, shipped_source

FOLDER = Path(runtime.__file__).parent
ROWS: list[dict[str, Any]] = [
    {"op": "center", "path": "0", "side": "output", "key": "", "axis": -1},
    {"op": "replace", "path": "1", "kind": "rmsnorm", "size": 8, "eps": 1e-3, "axis": -1, "weight": "weight",
     "bias": "bias", "offset": 0.0, "upcast": False, "mean_free": True},
    {"op": "resize", "path": "2", "name": "weight", "shape": [7, 8], "set": {"out_features": 7}},
    {"op": "resize", "path": "2", "name": "bias", "shape": [7]},
    {"op": "replace", "path": "3", "kind": "crmsnorm", "size": 8, "eps": 1e-3, "axis": -1, "weight": "weight",
     "bias": "bias", "offset": 0.0, "basis": "isometric", "expand": True},
    {"op": "affine", "path": "4", "size": 8, "eps": 4.0, "axis": -1, "weight": "weight", "bias": "bias"},
]  # fmt: skip
ALONE = """
import copy, json, pickle, sys
sys.modules["normconvert"] = None
import torch, modeling_normconvert as runtime
from torch import nn
model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)).eval()
runtime.apply_module_edits(model, json.loads(sys.argv[1]))
model.load_state_dict(torch.load("state.pt"))
x = torch.load("x.pt")
with torch.no_grad():
    results = [model(x), copy.deepcopy(model)(x), pickle.loads(pickle.dumps(model))(x)]
assert "transformers" not in sys.modules
assert type(model[1]).__module__ == "modeling_normconvert"
torch.save(results, "results.pt")
"""


def _alone(folder: Path, script: str, *arguments: str) -> str:
    """Run a script beside the file, where normconvert cannot be imported."""
    (folder / "modeling_normconvert.py").write_text(shipped_source(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_file_alone_computes_what_the_package_does(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)).eval()
    apply_module_edits(model, ROWS)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 70, 5)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(x, tmp_path / "x.pt")
    with torch.no_grad():
        expected = model(x)
    _alone(tmp_path, ALONE, json.dumps(ROWS))
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


def test_a_model_saved_by_the_file_carries_the_file(tmp_path: Path) -> None:
    script = """
import pickle, sys
sys.modules["normconvert"] = None
import torch, modeling_normconvert as runtime
from transformers import GPT2Config
config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
row = {"op": "replace", "path": "transformer.ln_f", "kind": "rmsnorm", "size": 8, "eps": 1e-5, "axis": -1,
       "weight": "weight", "bias": "bias"}
config.normconvert = {"format": 1, "architecture": "GPT2LMHeadModel", "modules": [row]}
model = runtime.GPT2LMHeadModel(config)
model.save_pretrained("saved")
again = pickle.loads(pickle.dumps(model))
assert type(again) is type(model) and type(model).__module__ == "modeling_normconvert"
print(type(again.transformer.ln_f).__name__)
"""
    assert _alone(tmp_path, script).strip() == "RMSNorm"
    assert (tmp_path / "saved" / "modeling_normconvert.py").read_text(encoding="utf-8") == shipped_source()


def test_the_file_needs_nothing_but_torch() -> None:
    """It is shipped alone: any other import would break every output."""
    tree = ast.parse(shipped_source())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {
        "__future__",
        "collections",
        "functools",
        "inspect",
        "json",
        "math",
        "pathlib",
        "re",
        "threading",
        "typing",
    }
    allowed |= {"warnings", "torch", "transformers"}
    assert {name.split(".")[0] for name in imported} <= allowed


def test_every_part_is_in_the_file_as_it_stands() -> None:
    source = shipped_source()
    for part in PARTS:
        text = (FOLDER / f"{part}.py").read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert str(ast.get_source_segment(text, node)) in source
    every = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "shipping"}
    assert set(PARTS) == every


def test_the_file_is_made_the_same_again_and_reads_well(tmp_path: Path) -> None:
    source = shipped_source()
    shipped_source.cache_clear()
    assert shipped_source() == source
    (tmp_path / "modeling_normconvert.py").write_text(source, encoding="utf-8")
    settings = str(Path(__file__).parents[2] / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", settings]
        done = subprocess.run([*ruff, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


HEAD = '"""A part."""\n\nfrom __future__ import annotations\n\n'


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("def one() -> None: ...\n", "b defines one, and so does a"),
        ("import re\n\none = re\n", "b defines one, and so does a"),
        ("from normconvert.runtime.a import two\n", "b imports two, which no part before it defines"),
        ("from normconvert.runtime.a import one as two\n", "import of the package in line 5"),
        ("import normconvert.runtime.a\n", "import of the package in line 5"),
        ("from .a import one\n", "import of the package in line 5"),
        ("def f() -> None:\n    from normconvert.runtime.a import one\n", "import of the package in line 6"),
        ("x = 1\nimport re\n", "import in line 6, behind other code"),
        ("from os import one\n", "b imports one, and a defines it"),
        ("def re() -> None: ...\n", "b defines re, and so does an import of re"),
    ],
)
def test_parts_that_make_no_file_are_refused(second: str, message: str) -> None:
    parts = {"a": f"{HEAD}import re\n\none = re\n", "b": HEAD + second}
    with pytest.raises(ValueError, match=message):
        assemble(parts)
