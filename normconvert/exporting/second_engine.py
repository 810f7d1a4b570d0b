"""An ONNX file in OpenVINO, where that is installed: the second engine that files are run in."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from normconvert.errors import NormConvertError, TraceError
from normconvert.exporting.capture import Captured
from normconvert.exporting.compare import Compared, compare
from normconvert.exporting.engines import Run
from normconvert.exporting.failures import LONGEST
from normconvert.exporting.parts import Part

MISSING = "run in onnxruntime, and not in OpenVINO, which is not installed: pip install 'normconvert[openvino]'"


def is_installed() -> bool:
    """Whether OpenVINO is there; it is not imported."""
    return find_spec("openvino") is not None


def in_openvino(file: Path, part: Part) -> Run:
    """The file in OpenVINO, on the CPU.

    Raises:
        TraceError: it has not the operators; the reason is its own.
    """
    import openvino

    try:
        # Where a CPU has 16-bit arithmetic it would compute in that, whatever the file says.
        model = openvino.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except Exception as error:  # it raises many kinds
        raise TraceError(f"OpenVINO cannot run the file: {_said(error)}") from error
    names = {name for one in model.inputs for name in one.names}

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = model({name: value.numpy() for name, value in inputs.items() if name in names})
        # Its own memory, which the next call writes to.
        return [torch.from_numpy(found[index].copy()) for index in range(len(model.outputs))]

    return run


def _said(error: Exception) -> str:
    """What it says beside where in its own code it said so: the line with the operations, else the last."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    found = next((line for line in lines if line.startswith("-- ")), lines[-1] if lines else type(error).__name__)
    return found.removeprefix("-- ")[:LONGEST]


def compared_in_openvino(file: Path, part: Part, captured: Captured, *, needed: bool) -> tuple[Compared | None, str]:
    """How close the file is in OpenVINO; or None, and in a sentence why it does not run there as it should.

    Raises:
        NormConvertError: the same, where the file is ``needed`` for it.
    """
    if not is_installed():
        return None, MISSING if needed else ""
    try:
        return compare(in_openvino(file, part), part, captured), ""
    except NormConvertError as error:
        if needed:
            raise type(error)(f"in OpenVINO: {error}") from error
        return None, f"not for OpenVINO: {error}"
