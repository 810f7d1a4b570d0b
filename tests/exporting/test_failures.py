"""A model that an exporter cannot follow is refused with the operation and the module, in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normconvert.errors import FidelityError, TraceError
from normconvert.exporting.capture import captures
from normconvert.exporting.compare import compare, widened
from normconvert.exporting.engines import save_onnx, save_program
from normconvert.exporting.parts import Part


class _Inner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "branch":
            return x if bool(x.sum() > 0) else -x * self.weight
        return torch.special.bessel_j0(x) * self.weight


class _Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = _Inner(kind)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def _part(kind: str) -> Part:
    model = _Outer(kind)
    checks = [{"x": torch.randn(rows, 4)} for rows in (1, 5)]
    return Part("m", model, lambda v: [("y", model(v["x"]))], {"x": torch.randn(3, 4)}, {"x": {0: "batch"}}, checks)


def _is_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert "Next steps" not in str(error)


def test_a_branch_on_values_names_the_module() -> None:
    with pytest.raises(TraceError, match=r"module inner.*test_failures\.py:\d+") as refused:
        list(captures(_part("branch")))
    _is_one_line(refused.value)


def test_an_operation_that_onnx_has_not_is_named(tmp_path: Path) -> None:
    part = _part("operation")
    captured = next(iter(captures(part)))
    with pytest.raises(TraceError, match=r"bessel_j0.*module inner") as refused:
        save_onnx(part, captured, tmp_path / "m.onnx", 20, "generic")
    _is_one_line(refused.value)


def test_a_file_that_is_off_at_another_size_is_no_export() -> None:
    part = _part("operation")
    captured = next(iter(captures(part)))
    assert compare(part.run, part, captured).least == {"batch": 1}
    with pytest.raises(FidelityError, match=r"off the model on x \(1, 4\)"):
        compare(lambda v: [y + (len(y) == 1) for y in part.run(v)], part, captured)


class _Mixed(nn.Module):
    """With a vector in float32, as norms often have."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).half()
        self.scale = nn.Parameter(torch.rand(4) / 3)
        self.register_buffer("shift", torch.rand(4).half())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x.to(self.linear.weight.dtype)) * self.scale + self.shift
        return result


def test_a_model_of_several_dtypes_is_as_it_was_once_its_truth_is_known() -> None:
    model = _Mixed().eval()
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    inputs = {"x": torch.rand(2, 4)}
    part = Part("model", model, lambda given: [("output", model(given["x"]))], inputs, {}, [])
    (truth,) = widened(part, [inputs])[0]
    assert truth.dtype == torch.float32
    for name, value in model.state_dict().items():
        old, place, copy = before[name]
        assert value.dtype == old.dtype
        assert value.data_ptr() == place
        assert torch.equal(value, copy)


class _Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + math.ceil(x.shape[0] / 2)


def test_a_program_that_torch_cannot_store_is_made_less_free(tmp_path: Path) -> None:
    model = _Rounded()
    inputs = {"x": torch.rand(3, 4)}
    part = Part("model", model, lambda given: [("output", model(given["x"]))], inputs, {"x": {0: "batch"}}, [])
    free, *_, fixed = captures(part)
    with pytest.raises(TraceError, match=r"cannot store the program: .*ceil"):
        save_program(part, free, tmp_path / "free.pt2")
    assert torch.equal(save_program(part, fixed, tmp_path / "fixed.pt2")(inputs)[0], model(inputs["x"]))
