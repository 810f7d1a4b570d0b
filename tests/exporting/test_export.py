"""Exported files run without normconvert, for batches of any size, and say what the model says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import normconvert
from normconvert.errors import FidelityError, InputError
from normconvert.exporting.export import export


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "fused"
    normconvert.convert("demo:convnet", out, "fuse-bn", verify=False)
    return out


def _images(count: int) -> torch.Tensor:
    import timm

    size = timm.create_model("local-dir:" + str(Path(normconvert.__file__).parent / "demos/convnet")).pretrained_cfg
    return torch.randn(count, *size["input_size"])


def test_an_onnx_file_runs_in_onnxruntime_and_holds_no_batch_norm(converted: Path, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    report = export(converted, tmp_path / "model.onnx", against="demo:convnet")
    assert report.error <= 1e-4
    assert report.against is not None
    assert report.against <= 1e-4
    operations = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "Conv" in operations
    assert "BatchNormalization" not in operations
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    original = normconvert.load(converted)
    for count in (1, 3):
        x = _images(count)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), original(x), rtol=1e-3, atol=1e-4)


def test_a_program_runs_in_torch(converted: Path, tmp_path: Path) -> None:
    report = export(converted, tmp_path / "model.pt2")
    (one,) = report.files
    assert one.inputs["x"][0] == "batch"
    assert one.varies["batch"] == (1, None)
    module = torch.export.load(tmp_path / "model.pt2").module()
    x = _images(4)
    with torch.no_grad():
        assert torch.allclose(module(x)[0], normconvert.load(converted)(x), rtol=1e-4, atol=1e-5)


def test_a_text_model_may_vary_in_length(tmp_path: Path) -> None:
    out = tmp_path / "out"
    normconvert.convert("demo:gpt2", out, "rmsnorm", verify=False)
    report = export(out, tmp_path / "model.pt2", against="demo:gpt2")
    (one,) = report.files
    assert one.inputs == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert report.against is not None
    assert report.against <= 1e-4


def test_another_model_is_not_exported_in_its_place(converted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    for file in converted.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = load_file(other / "model.safetensors")
    state["conv1.0.bias"] += 1.0
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FidelityError, match=r"the file computes what .*other computes .* off demo:convnet"):
        export(other, tmp_path / "model.pt2", against="demo:convnet")
    assert not list(tmp_path.glob("*model*"))
    # A swap is not there to compute what the original computes: that is said, and the export is not at fault.
    record = json.loads((other / "normconvert.json").read_text())
    record["plan"]["method"] = "swap un"
    (other / "normconvert.json").write_text(json.dumps(record))
    report = export(other, tmp_path / "model.pt2", against="demo:convnet")
    assert report.error <= 1e-4
    assert report.against is not None
    assert report.against > 1e-2
    assert f"{other} is a swap un: its norms learnt what they compute" in report.notes[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.tflite", "ends in .onnx or .pt2, or a folder"),
        ("no/such/model.onnx", "does not exist"),
        ("there.pt2", "exists"),
    ],
)
def test_a_file_that_cannot_be_made_is_refused_at_once(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "there.pt2").write_bytes(b"mine")
    with pytest.raises(InputError, match=words):
        export("demo:convnet", tmp_path / name)
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"
