"""Which operator of an engine a norm becomes: ONNX has RMSNormalization from opset 23 on, onnxruntime its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DEFAULT_OPSETS: Mapping[str, tuple[int, ...]] = {"generic": (23, 20), "onnxruntime": (20,), "openvino": (20,)}
"""Target -> the opsets that are written if none is asked for: one after the other, until a file runs as it should.

Opset 23 has whole operators for norms, attention and rotary embeddings, of which engines know the newest forms in part.
"""

CONTRIB = "com.microsoft"
"""The domain of onnxruntime's operators; the norm stands there while torch writes, which knows no such one of ONNX."""

NAME = "SimplifiedLayerNormalization"


def _schema() -> Any:
    """What onnxruntime's operator takes: onnx knows the schemas of its own alone."""
    from onnx.defs import OpSchema

    parameter, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    return OpSchema(
        NAME, CONTRIB, 1,
        inputs=[parameter("X", "T"), parameter("scale", "T")],
        outputs=[parameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)"], "")],
        attributes=[attribute("axis", OpSchema.AttrType.INT), attribute("epsilon", OpSchema.AttrType.FLOAT)],
    )  # fmt: skip


def translations(target: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operation of torch -> the onnxscript function that stands for it, where that is not torch's own choice."""
    if target != "onnxruntime":
        return {}
    import torch
    from onnxscript import values
    from onnxscript.onnx_opset import opset18

    simplified = values.Op(values.Opset(CONTRIB, 1), NAME, _schema())

    def normalised(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        epsilon = torch.finfo(torch.float32).eps if eps is None else float(eps)
        axis = -len(normalized_shape)
        if weight is None:
            one: Any = opset18.Constant(value_float=1.0)
            weight = opset18.CastLike(opset18.Expand(one, normalized_shape), input)
        return simplified(input, weight, axis=axis, epsilon=epsilon)

    return {torch.ops.aten.rms_norm.default: normalised}


def renamed_norms(model: Any, target: str) -> None:
    """Put the norms where onnxruntime has them: among ONNX's own operators; the graph is changed."""
    for node in model.graph.all_nodes() if target == "onnxruntime" else ():
        if node.domain == CONTRIB and node.op_type == NAME:
            node.domain = ""
    if not any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.graph.opset_imports.pop(CONTRIB, None)
