"""Which BatchNorms other tools fuse into the layers before them: the figures beside ours in the coverage sweep.

Each function takes a model in eval mode and returns the module paths of the BatchNorms that are gone. A tool that
cannot take the model raises, and the sweep writes down the first line of what it says.

- ``torch.fx``: ``torch.fx.experimental.optimization.fuse``.
- ``onnxslim``: ``torch.onnx.export``, its optimiser, and ``onnxslim.slim``.
- ``optimum.fx``: ``FuseBatchNorm2dInConv2d`` and ``FuseBatchNorm1dInLinear``. They need an older transformers; see
  ``tools/census/fusers_optimum.py``.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

Row = dict[str, Any]


def fused_by_torch_fx(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """``fuse`` of torch.fx, which traces the model symbolically."""
    from torch.fx.experimental.optimization import fuse

    traced = fx.symbolic_trace(model)
    before = norms_called(traced)
    fused = fuse(traced, no_trace=True)
    assert isinstance(fused, fx.GraphModule)
    return sorted(before - norms_called(fused))


def norms_called(traced: fx.GraphModule) -> set[str]:
    """Paths of the BatchNorms that a traced model calls as modules."""
    modules = dict(traced.named_modules())
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    return {path for path in called if isinstance(modules.get(path), BATCH_NORMS)}


def fused_by_onnxslim(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """What is no BatchNormalization any more after the export, the exporter's optimiser and onnxslim."""
    import onnxslim

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (), kwargs=dict(inputs), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    before = _nodes(program.model_proto)
    program.optimize()
    return sorted(before - _nodes(onnxslim.slim(program.model_proto)))


def _nodes(model: Any) -> set[str]:
    """Paths of the modules whose running variance a BatchNormalization reads; it is the fifth input."""
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return {node.input[4].removesuffix(".running_var") for node in norms}


TOOLS: Mapping[str, Callable[[nn.Module, Mapping[str, Any]], list[str]]] = {
    "torch.fx": fused_by_torch_fx,
    "onnxslim": fused_by_onnxslim,
}


def fused_by(tool: str, model: nn.Module, inputs: Mapping[str, Any], seconds: float = 120) -> Row:
    """``{"fused": paths}``, or ``{"failure": what the tool says}``; more than ``seconds`` of processor time is one.

    Args:
        tool: one of :data:`TOOLS`.
        model: float32, in eval mode; the tools work on copies.
        inputs: keyword arguments of its forward.
        seconds: processor time.
    """
    try:
        with _limited(seconds):
            return {"fused": TOOLS[tool](model, inputs)}
    except Exception as error:  # whatever the tool raises is what it has to say
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"failure": f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
