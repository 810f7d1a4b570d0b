"""What `torch.export` does for readers that a trace has not: switched off while a model is exported.

- Stacks: each node's is noted for error messages. They take a quarter of a trace's time.
- Dispatch: an operation goes through four modes and is noted at the last. One of our own, whose result is known before
  it is run, is noted at once (`noted`).
- Code: a graph module writes and compiles Python for its graph whenever a pass is through with it, half a dozen times
  an export. Here the graph is read and nothing runs it, so its code is made when it is called.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from normconvert.compat.torch import DisableTorchFunction, OpOverload


@contextmanager
def lean_export() -> Iterator[None]:
    """Have no stack noted with each node and no code made of a graph before it runs, within and in this thread."""
    with _without_stacks(), _without_code():
        yield


@contextmanager
def _without_stacks() -> Iterator[None]:
    config: Any = importlib.import_module("torch.fx.config")
    # Where a release lacks the switch, setting it does nothing.
    before = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


@contextmanager
def _without_code() -> Iterator[None]:
    graph_module: Any = fx.GraphModule
    with_trees = getattr(fx.graph, "_PyTreeCodeGen", CodeGen)
    made: Any = graph_module.recompile
    thread = threading.get_ident()

    def recompile(module: fx.GraphModule) -> Any:
        codegen: Any = getattr(module.graph, "_codegen", None)
        # The patch is seen by all threads, and only graphs as export makes them are known to do without code.
        if threading.get_ident() != thread or type(codegen) not in (CodeGen, with_trees):
            return made(module)
        if type(codegen) is not CodeGen:
            # recompile sets these as well, and they are asked for without a call.
            module._in_spec = codegen.pytree_info.in_spec
            module._out_spec = codegen.pytree_info.out_spec

        def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            made(self)  # replaces this function
            return type(self).forward(self, *args, **kwargs)

        type(module).forward = forward
        return None

    graph_module.recompile = recompile
    try:
        yield
    finally:
        graph_module.recompile = made


def noted(operation: OpOverload, x: Tensor, *settings: str) -> Tensor:
    """``operation(x, *settings)``, whose result is like ``x``; while ``x`` is traced it is noted without being run.

    Args:
        operation: without side effects; the graph is the same as if it had run.
        x: of any shape and dtype.
        settings: its other arguments.
    """
    proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
    try:
        current, proxy_of, track, apart = (getattr(proxies, name) for name in NOTING)
    except AttributeError:
        run: Tensor = operation(x, *settings)
        return run
    with DisableTorchFunction():
        mode = current()
        held = proxy_of(x, mode.tracer, None) if mode is not None else None
        if held is None:  # nothing is traced, or this is a constant
            return operation(x, *settings)
        name = operation.overloadpacket.__name__
        node = mode.tracer.create_proxy("call_function", operation, (held.proxy, *settings), {}, name=name)
        with apart():
            made = torch.empty_like(x)
        track(made, node, constant=None, tracer=mode.tracer)
        return made


NOTING = ("get_proxy_mode", "get_proxy_slot", "track_tensor_tree", "disable_proxy_modes_tracing")
"""Names of ``torch.fx.experimental.proxy_tensor``, whose use is that of operations of higher order."""
