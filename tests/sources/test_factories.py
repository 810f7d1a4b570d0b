"""``--arch FILE.py:FACTORY``: weights of a model that a file of the user's makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from tests.support.perturb import perturb

CODE = """
import torch
from sizes import WIDTH
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, WIDTH), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, idx):
        return self.head(self.norm(self.blocks(self.embed(idx))) * self.scale)


def small():
    return Net()


def example_inputs():
    return (torch.arange(14).reshape(2, 7),)


number = 3


def broken():
    return 1 / 0


def text():
    return "a model"
"""


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, Path, nn.Module]:
    """``--arch``, a wrapped pickle of weights, and the model."""
    (tmp_path / "sizes.py").write_text("WIDTH = 32\n")
    file = tmp_path / "net.py"
    file.write_text(CODE)
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        names: dict[str, object] = {}
        sys.modules.pop("sizes", None)
        exec(compile(CODE, str(file), "exec"), names)
    finally:
        sys.path.remove(str(tmp_path))
    model: nn.Module = names["small"]()  # type: ignore[operator]
    perturb(model)
    weights = tmp_path / "last.pt"
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "step": 7}, weights)
    return f"{file}:small", weights, model.eval()


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm", "fold"])
def test_weights_of_a_model_that_a_file_makes_convert(
    method: str, made: tuple[str, Path, nn.Module], tmp_path: Path
) -> None:
    arch, weights, model = made
    out = tmp_path / "out"
    report = normconvert.convert(weights, out, method, arch=arch, trust_remote_code=True)
    assert (report.library, report.architecture) == ("torch", "net.py:small")
    # What is behind the last norm multiplies it channel by channel: neither can its weight move on, nor fewer channels.
    assert (report.converted, report.total) == (2 if method == "fold" else 3, 3)
    assert report.fidelity is not None
    assert report.fidelity.passed
    found = normconvert.load(out, arch=arch, trust_remote_code=True)
    assert found.get_submodule("head").in_features == 32, "what is parted from a narrower table stays as wide as it was"
    idx = torch.randint(0, 50, (3, 11))
    with torch.no_grad():
        assert torch.allclose(found(idx), model(idx), atol=1e-4)
    record = json.loads((out / "normconvert.json").read_text())
    assert record["options"]["arch"] == "net.py:small", "and no path of this machine"
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "normconvert.json").read_text()
    assert not list(out.glob("*.py"))
    with pytest.raises(InputError, match=r"its model is made by net\.py:small: give that file, --arch"):
        normconvert.load(out)


def test_its_code_runs_only_if_it_is_trusted(made: tuple[str, Path, nn.Module], tmp_path: Path) -> None:
    arch, weights, _ = made
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + CODE)
    with pytest.raises(InputError, match="runs the code of that file: add --trust-remote-code if you trust it"):
        normconvert.inspect(weights, arch=arch)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_factory_is_said_in_one_line(made: tuple[str, Path, nn.Module], tmp_path: Path) -> None:
    arch, weights, _ = made
    file = arch.rpartition(":")[0]
    (tmp_path / "bare.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(2, 2)\n")
    (tmp_path / "wrong.py").write_text("import nothing_of_the_kind\n")
    cases = {
        f"{file}:absent": "net.py has no function absent()",
        f"{file}:number": "net.py has no function number()",
        f"{file}:broken": "broken() failed: division by zero",
        f"{file}:text": "returned a str, expected a torch.nn.Module",
        f"{tmp_path / 'bare.py'}:net": "bare.py has no function example_inputs() that returns how the model is called",
        f"{tmp_path / 'wrong.py'}:net": "wrong.py does not run: No module named 'nothing_of_the_kind'",
        f"{tmp_path / 'gone.py'}:net": "no such file",
        "net.py": "expected timm:NAME, e.g. timm:vit_small_patch16_224, or FILE.py:FACTORY",
    }
    for given, message in cases.items():
        with pytest.raises(InputError) as caught:
            normconvert.inspect(weights, arch=given, trust_remote_code=True)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_line_takes_it(made: tuple[str, Path, nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    arch, weights, _ = made
    assert run(["inspect", str(weights), "--arch", arch, "--trust-remote-code", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["norms"] == {"converted": 3, "total": 3}
