"""Private names of torch: how a graph is made and followed without values, and weights that are read when used."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, TypeVar, cast

import torch

from normconvert.compat.private_names import PrivateName, attribute, needed

SEEN = "2.10.0, 2.14.1"
_SLOWER = "a trace takes a fifth more time"
_LONGER = "a marker takes twice the time"
_PROXIES = "torch.fx.experimental.proxy_tensor"
NAMES = (
    PrivateName("torch.utils._pytree", "nested inputs and outputs, tensor by tensor", SEEN),
    PrivateName("torch.utils._python_dispatch.TorchDispatchMode", "seeing every operation below autograd", SEEN),
    PrivateName("torch.utils._python_dispatch._disable_current_modes", "known values, computed during a trace", SEEN),
    PrivateName("torch._C.DisableTorchFunction", "known values, computed during a trace", SEEN),
    PrivateName("torch._C.DisableTorchFunctionSubclass", "what is known of a weight that is not read yet", SEEN),
    PrivateName("torch._subclasses.fake_tensor.FakeTensor", "constants that have no value in a trace", SEEN),
    PrivateName("torch._subclasses.fake_tensor.FakeTensorMode", "tensors that pretend to be on the CPU", SEEN),
    PrivateName("torch._subclasses.fake_tensor.DataDependentOutputException", "why a trace stopped", SEEN),
    PrivateName("torch._subclasses.fake_tensor.DynamicOutputShapeException", "why a trace stopped", SEEN),
    PrivateName("torch._ops.OpOverload", "operations of a graph and what they write to", SEEN),
    PrivateName("torch._ops.OpOverload._schema", "operations of a graph and what they write to", SEEN),
    PrivateName("torch.Tensor._version", "whether a known value was written to", SEEN),
    PrivateName("torch.Tensor._make_wrapper_subclass", "a weight that is read when it is used", SEEN),
    PrivateName("torch.Tensor._is_param", "such a weight counts as a parameter", SEEN, "torch refuses it in a module"),
    PrivateName("torch.Tensor._grad_fn", "such a weight answers it without being read", SEEN, "nobody asks"),
    PrivateName("torch.fx.graph._PyTreeCodeGen", "no code is made of a graph that nobody runs", SEEN, _SLOWER),
    PrivateName("torch.fx.Graph._codegen", "the same", SEEN, _SLOWER),
    PrivateName("torch.fx.GraphModule._in_spec", "the same", SEEN, _SLOWER),
    PrivateName("torch.fx.GraphModule._out_spec", "the same", SEEN, _SLOWER),
    PrivateName("torch.fx.config.do_not_emit_stack_traces", "no stacks are noted with nodes", "2.14.1", _SLOWER),
    PrivateName(f"{_PROXIES}.get_proxy_mode", "markers, noted in a graph without being run", "2.14.1", _LONGER),
    PrivateName(f"{_PROXIES}.get_proxy_slot", "the same", "2.14.1", _LONGER),
    PrivateName(f"{_PROXIES}.track_tensor_tree", "the same", "2.14.1", _LONGER),
    PrivateName(f"{_PROXIES}.disable_proxy_modes_tracing", "the same", "2.14.1", _LONGER),
    PrivateName("torch._export.utils._compiling_state_context", "model code is called as if it were traced", SEEN),
    PrivateName(
        "torch.nn.TransformerEncoderLayer.activation_relu_or_gelu",
        "in the shipped file: a converted norm in torch's own encoder layer is called", "2.14.1",
        "the shipped file refuses to edit such a layer",
    ),
)  # fmt: skip

with needed(NAMES):
    import torch.utils._pytree as pytree
    from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass
    from torch._ops import OpOverload
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "HIDDEN_ATTRIBUTES",
    "NAMES",
    "DataDependentOutputException",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "as_exported",
    "pytree",
    "schema",
    "version",
    "without_modes",
    "without_printed_graphs",
    "wrapper",
]  # fmt: skip

Wrapper = TypeVar("Wrapper", bound=torch.Tensor)
HIDDEN_ATTRIBUTES = ("_version", "_grad_fn")
"""Of a tensor; what is asked for without reading its values."""


def schema(operation: object) -> Any:
    """The declared signature of an operation of torch; None for anything else.

    Raises:
        UnsupportedVersion: operations have none: what they write to would go unseen.
    """
    return attribute(operation, "_schema", NAMES) if isinstance(operation, OpOverload) else None


def version(tensor: torch.Tensor) -> int:
    """How often the memory of a tensor was written to.

    Raises:
        UnsupportedVersion: torch does not tell.
    """
    return int(attribute(tensor, "_version", NAMES))


def wrapper(kind: type[Wrapper], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Wrapper:
    """A tensor of class ``kind`` without memory that counts as a parameter.

    Raises:
        UnsupportedVersion: torch cannot make one.
    """
    made: Any = attribute(kind, "_make_wrapper_subclass", NAMES)(kind, torch.Size(shape), dtype=dtype, device=device)
    made._is_param = True  # isinstance(made, nn.Parameter) holds
    found: Wrapper = made
    return found


def as_exported() -> AbstractContextManager[None]:
    """``torch.compiler.is_compiling()`` and ``is_exporting()`` are true within, as they are while torch exports.

    Models ask whether they are traced, and choose other operations then.

    Raises:
        UnsupportedVersion: torch cannot be told so.
    """
    with needed(NAMES):
        from torch._export.utils import _compiling_state_context
    told: AbstractContextManager[None] = _compiling_state_context()
    return told


@contextmanager
def without_printed_graphs() -> Iterator[None]:
    """What torch.export says on stderr where it stops, all of the graph so far, stays off the user's screen."""
    stream, logger = sys.stderr, logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    sys.stderr = cast("TextIO", _WithoutGraphs(stream))
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sys.stderr = stream
        logger.setLevel(level)


class _WithoutGraphs:
    """A stream but for the code of graphs, which comes in one piece, and the end of that line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._ends = stream, False

    def write(self, text: str) -> int:
        is_end, self._ends = self._ends and text == "\n", "def forward(self" in text and "torch.ops." in text
        return len(text) if is_end or self._ends else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
