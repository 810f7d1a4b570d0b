"""A program as a file, and the file run by what will run it: onnxruntime, or torch without the model's code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normconvert.errors import InputError, NormConvertError, TraceError
from normconvert.exporting.capture import Captured, renamed
from normconvert.exporting.failures import why
from normconvert.exporting.parts import Part
from normconvert.exporting.request import OPSETS

Run = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Named input tensors -> output tensors."""

LARGEST = 1_800_000_000
"""Bytes of weights; one protobuf holds little more."""


def check_opset(opset: int | None) -> None:
    """Refuse a version of ONNX's operators that cannot be written or run here.

    Raises:
        InputError: torch's exporter or the installed onnx does not know it.
    """
    if opset is None:
        return
    import onnx

    last = min(OPSETS[-1], int(onnx.defs.onnx_opset_version()))
    if not OPSETS[0] <= opset <= last:
        raise InputError(f"unknown opset {opset}; expected {OPSETS[0]} to {last}")


def save_program(part: Part, captured: Captured, file: Path) -> Run:
    """Write a program of torch.export; the file is what runs.

    Raises:
        TraceError: torch cannot store it, as where sizes are rounded; the operation is named.
    """
    try:
        torch.export.save(captured.program, file)
        module = torch.export.load(file).module()
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds
        raise TraceError(f"torch.export cannot store the program: {why(error, part.model)}") from error

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*inputs.values()))

    return run


def save_onnx(part: Part, captured: Captured, file: Path, opset: int, target: str) -> Run:
    """Write an ONNX file and open it in onnxruntime.

    Raises:
        TraceError: ONNX cannot express the program, or onnxruntime has not the operators; the module is named.
    """
    import onnxruntime

    from normconvert.exporting.norm_operators import renamed_norms, translations

    _freed_from_memory(captured.program)
    try:
        made: Any = torch.onnx.export(
            captured.program,
            dynamo=True,
            opset_version=opset,
            input_names=list(part.inputs),
            output_names=part.outputs,
            custom_translation_table=translations(target),
            verbose=False,
        )
        renamed_norms(made.model, target)
        _tidy(made.model, captured)
        size = sum(p.numel() * p.element_size() for p in part.model.parameters())
        made.save(str(file), external_data=size > LARGEST)
    except NormConvertError:
        raise
    except Exception as error:  # the exporter raises many kinds
        raise TraceError(f"ONNX cannot express the model: {why(error, part.model, captured.program)}") from error
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it says beside its errors has escape codes, and no place in a report
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # so does the engine
        raise TraceError(f"onnxruntime cannot run the file: {why(error, part.model)}{_half(part)}") from error
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        # The exporter drops inputs that nothing reads, and a session refuses what it does not know.
        found = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})
        return [torch.from_numpy(value) for value in found]

    return run


def _freed_from_memory(program: Any) -> None:
    """Have no operation depend on how its input lies in memory: the exporter's own attention lays it out otherwise."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
            with graph.inserting_after(node):
                made = graph.call_function(
                    torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    program.graph_module.recompile()


def _half(part: Part) -> str:
    """What to do where an engine has no kernels for the dtype."""
    kinds = {p.dtype for p in part.model.parameters()} & {torch.float16, torch.bfloat16}
    return "; with --dtype float32 it may" if kinds else ""


def _tidy(model: Any, captured: Captured) -> None:
    """Name the sizes, and take out where on this machine each operation came from."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                _name_sizes(value, captured)
        for value in graph.inputs:
            _name_sizes(value, captured)
    model.metadata_props.clear()


def _name_sizes(value: Any, captured: Captured) -> None:
    value.metadata_props.clear()
    if value.shape is None:
        return
    import onnx_ir

    value.shape = onnx_ir.Shape(
        [size if isinstance(size, int) else _size(str(size.value), captured) for size in value.shape]
    )


def _size(text: str, captured: Captured) -> str | None:
    """A size in our names; None for one that nobody named."""
    return renamed(text, captured) if text != "None" and re.search(r"\w", text) else None
