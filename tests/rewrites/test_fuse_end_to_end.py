"""fuse-bn from files to files: written, verified, loaded every way, and refused where a checkpoint cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normconvert
from normconvert.cli import run
from normconvert.errors import NothingToConvert
from normconvert.files import embedded
from normconvert.runtime import RMSNorm
from tests.support.perturb import perturb
from tools.demos.digits import digits
from tools.demos.train_demos import DIGIT_MODELS, accuracy

BN = nn.modules.batchnorm._BatchNorm


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuse") / "convnet"
    report = normconvert.convert("demo:convnet", out, "fuse-bn")
    assert report.fidelity is not None
    assert report.fidelity.algebra <= 1e-10
    assert report.fidelity.rounding is not None
    assert report.fidelity.rounding <= 2
    return out


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A transformers ResNet with the head, and its conversion."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")
    folder = tmp_path_factory.mktemp("fuse") / "resnet"
    model = ResNetForImageClassification(config)
    perturb(model)
    model.save_pretrained(folder)
    out = folder.with_name("resnet-fused")
    report = normconvert.convert(folder, out, "fuse-bn")
    assert (report.converted, report.total) == (8, 8)
    return folder, out


def _norms(model: nn.Module) -> int:
    return sum(isinstance(m, BN) for m in model.modules())


def test_a_trained_network_reads_digits_as_well_without_its_norms(convnet: Path) -> None:
    import timm

    original = timm.create_model(f"local-dir:{embedded.demo_folder('convnet')}", pretrained=True).eval()
    fused = normconvert.load(convnet)
    assert (_norms(original), _norms(fused)) == (15, 0)
    images, labels = digits("test", size=DIGIT_MODELS["convnet"]["size"])
    assert accuracy(fused, images, labels) == accuracy(original, images, labels) > 0.99
    names = set(load_file(convnet / "model.safetensors"))
    assert not [n for n in names if "running" in n or "tracked" in n]


def test_a_transformers_model_loads_both_ways_and_is_saved_again(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification as Auto

    source, out = resnet
    x = torch.randn(2, 3, 64, 64)
    original = Auto.from_pretrained(source).eval()
    remote = Auto.from_pretrained(out, trust_remote_code=True).eval()
    remote.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = original(x).logits
        for model in (remote, normconvert.load(out), normconvert.load(tmp_path / "again")):
            assert _norms(model) == 0
            assert torch.allclose(model(x).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_unmodified_library_refuses_it(resnet: tuple[Path, Path], convnet: Path, tmp_path: Path) -> None:
    """It must not fill the norms with ones and zeros and go on."""
    import timm
    from transformers import AutoModelForImageClassification as Auto
    from transformers import ResNetForImageClassification

    Auto.from_pretrained(resnet[1], trust_remote_code=True).save_pretrained(tmp_path / "again")
    for folder in (resnet[1], tmp_path / "again"):
        with pytest.raises(RuntimeError, match="size"):
            ResNetForImageClassification.from_pretrained(folder)
        assert "normconvert.load" in (resnet[1] / "README.md").read_text(encoding="utf-8")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"local-dir:{convnet}", pretrained=True)


def test_what_is_fused_already_has_nothing_to_do(convnet: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingToConvert, match="nothing to do"):
        normconvert.convert(convnet, tmp_path / "out", "fuse-bn")
    assert run(["fuse-bn", str(convnet), str(tmp_path / "out"), "-q"]) == 3


def test_a_weight_file_gets_a_folder_beside_it(tmp_path: Path) -> None:
    import timm

    source = tmp_path / "mine.safetensors"
    save_file(perturb(timm.create_model("test_resnet")).state_dict(), source)
    assert run(["fuse-bn", str(source), "--arch", "timm:test_resnet", "-q"]) == 0
    assert _norms(normconvert.load(tmp_path / "mine-fused")) == 0


def test_out_may_be_left_out_for_weight_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse-bn", "demo:convnet"]) == 2
    assert "OUT" in capsys.readouterr().err


def _spoilt(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for file in embedded.demo_folder("convnet").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_var", -1.0), ("running_var", float("nan")), ("running_mean", float("nan")), ("weight", float("inf"))],
)
def test_impossible_statistics_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    source = _spoilt(tmp_path, lambda state: state[f"layer1.0.bn1.{name}"][3].fill_(value))
    before = (source / "model.safetensors").read_bytes()
    assert run(["fuse-bn", str(source), str(tmp_path / "out"), "-q"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"layer1.0.bn1.{name} holds" in said[0]
    assert not (tmp_path / "out").exists()
    assert (source / "model.safetensors").read_bytes() == before


def test_dead_channels_and_fresh_statistics_are_fused_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["layer1.0.bn1.running_var"][3] = 0.0
        state["layer1.0.bn2.num_batches_tracked"].zero_()

    assert run(["fuse-bn", str(_spoilt(tmp_path, change)), str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "zero, as dead channels have (fused as they are): layer1.0.bn1.running_var (1 of" in said
    assert "layer1.0.bn2" in said.partition("never updated")[2]
    assert "15 of 15" in said


def test_inspection_says_where_each_norm_would_go() -> None:
    report = normconvert.inspect("demo:convnet", "fuse-bn")
    reasons = {v.path: v.reason for v in report.plan.verdicts}
    assert reasons["layer1.0.bn1"] == "into `layer1.0.conv1` before it."
    assert len(reasons) == 15


@pytest.mark.slow
@pytest.mark.parametrize("order", [("fuse-bn", "rmsnorm"), ("rmsnorm", "fuse-bn")])
def test_one_conversion_after_another(tmp_path: Path, order: tuple[str, str]) -> None:
    """A converted folder is a source like any other, and what it was stays done."""
    import timm

    source = tmp_path / "mobilevit"
    source.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("mobilevit_xxs").eval()
    perturb(model)
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text('{"architecture": "mobilevit_xxs", "num_classes": 1000}', encoding="utf-8")
    first = normconvert.convert(source, tmp_path / "one", order[0], verify=False)
    report = normconvert.convert(tmp_path / "one", tmp_path / "two", order[1])
    assert first.converted > 0
    assert report.converted > 0
    found = normconvert.load(tmp_path / "two")
    assert _norms(found) == 0
    assert sum(isinstance(m, RMSNorm) for m in found.modules()) >= 20 or order[0] == "rmsnorm"
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.allclose(found(x), model(x), rtol=1e-3, atol=1e-4)
