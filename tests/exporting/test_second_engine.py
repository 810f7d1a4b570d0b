"""A file for OpenVINO is run in OpenVINO before it appears; one for any engine says whether it runs there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.errors import FidelityError, TraceError
from normconvert.exporting import second_engine
from normconvert.exporting.capture import Captured, captures
from normconvert.exporting.engines import save_onnx
from normconvert.exporting.export import export
from normconvert.exporting.parts import Part


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _made(file: Path) -> tuple[Part, Captured]:
    model = _Scaled().eval()
    checks = [{"x": torch.randn(rows, 4)} for rows in (1, 5)]
    part = Part("m", model, lambda v: [("y", model(v["x"]))], {"x": torch.randn(3, 4)}, {"x": {0: "batch"}}, checks)
    captured = next(iter(captures(part)))
    save_onnx(part, captured, file, 20, "openvino")
    return part, captured


def test_a_file_is_run_in_openvino_at_other_sizes(tmp_path: Path) -> None:
    part, captured = _made(tmp_path / "m.onnx")
    compared, note = second_engine.compared_in_openvino(tmp_path / "m.onnx", part, captured, needed=True)
    assert note == ""
    assert compared is not None
    assert compared.sizes == 3
    assert compared.error < 1e-6


@pytest.mark.parametrize("needed", [True, False])
def test_a_file_that_is_off_there_is_no_export_for_it(tmp_path: Path, needed: bool) -> None:
    part, captured = _made(tmp_path / "m.onnx")
    with torch.no_grad():
        next(part.model.parameters()).mul_(1.01)
    if needed:
        with pytest.raises(FidelityError, match=r"^in OpenVINO: the exported file is 0\.\d+ off the model"):
            second_engine.compared_in_openvino(tmp_path / "m.onnx", part, captured, needed=True)
        return
    compared, note = second_engine.compared_in_openvino(tmp_path / "m.onnx", part, captured, needed=False)
    assert compared is None
    assert note.startswith("not for OpenVINO: the exported file is 0.")


def test_operators_that_it_has_not_are_told_in_one_line(tmp_path: Path) -> None:
    import onnx

    part, captured = _made(tmp_path / "m.onnx")
    made = onnx.load(tmp_path / "m.onnx")
    made.graph.node[0].op_type = "Frobnicate"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(TraceError, match=r"in OpenVINO: OpenVINO cannot run the file: .*Frobnicate") as refused:
        second_engine.compared_in_openvino(tmp_path / "m.onnx", part, captured, needed=True)
    assert "\n" not in str(refused.value)


def test_an_export_says_what_it_was_run_in(tmp_path: Path) -> None:
    report = export("demo:convnet", tmp_path / "model.onnx", target="openvino", opset=20)
    assert report.files[0].engines == ("onnxruntime", "openvino")
    assert not any("OpenVINO" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "generic"])
def test_a_converted_text_model_runs_there(tmp_path: Path, target: str) -> None:
    normconvert.convert("demo:gpt2", tmp_path / "rms", "rmsnorm", verify=False)
    (one,) = export(tmp_path / "rms", tmp_path / "model.onnx", target=target, with_past=True).files
    assert one.engines == ("onnxruntime", "openvino")
