"""A model and a workload as something to be timed: eagerly, compiled, or captured in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.benchmark.timing import Step
from normconvert.benchmark.workloads import STEPS, Workload, cache_name, on_device

MODES = ("eager", "compiled", "graphs")
"""As it is; through ``torch.compile``; its kernels captured in a CUDA graph and replayed."""


def make_step(model: nn.Module, work: Workload, mode: str, dtype: torch.dtype, device: torch.device) -> Step:
    """What to time; ready to run but for a warm-up.

    Args:
        model: on ``device``, in eval mode.
        work: its inputs are moved and cast.
        mode: one of :data:`MODES`.
        dtype: that of the model's parameters.
        device: where it runs.
    """
    inputs = on_device(work.inputs, dtype, device)
    # For these sizes alone: code that is made for any size is slower.
    called: Any = torch.compile(model, dynamic=False) if mode == "compiled" else model
    step = _decode(model, called, inputs, mode) if work.kind == "decode" else Step(lambda: called(**inputs))
    return _captured(step, device) if mode == "graphs" else step


def _decode(model: nn.Module, called: Any, inputs: dict[str, Any], mode: str) -> Step:
    """One more token after the prompt; after `STEPS` of them the cache is set back to the end of the prompt.

    In eager mode the cache grows by each token; compiled and captured it is as long as it will ever be, as `generate`
    has it there.
    """
    ids = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "use_cache")}
    held = cache_name(model)
    start: dict[str, Any] = {} if mode == "eager" else {held: _static_cache(model, ids.shape[1] + STEPS)}
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True, **start, **rest), held)
    token = ids[:, -1:].contiguous()
    if mode != "eager":
        reset = _reset(cache)
        return Step(lambda: called(input_ids=token, use_cache=True, **{held: cache}, **rest), reset, STEPS)
    now: list[Any] = []

    def prepare() -> None:
        # A cache that grows cannot be set back; the copy is made outside the time that is measured.
        now[:] = [copy.deepcopy(cache)]

    return Step(lambda: called(input_ids=token, use_cache=True, **{held: now[0]}, **rest), prepare, STEPS)


def _static_cache(model: nn.Module, length: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=getattr(model, "config", None), max_cache_len=length)


def _reset(cache: Any) -> Callable[[], None]:
    """Sets a static cache back to its present length; what lies behind it is masked, and written over."""
    saved = [
        (layer, name, value.clone() if isinstance(value, Tensor) else value)
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, int) or (isinstance(value, Tensor) and value.numel() == 1)
    ]

    def reset() -> None:
        for layer, name, value in saved:
            if isinstance(value, Tensor):
                getattr(layer, name).copy_(value)
            else:
                setattr(layer, name, value)

    return reset


def _captured(step: Step, device: torch.device) -> Step:
    """The kernels of one call in a CUDA graph."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # as capturing demands: first calls allocate and choose kernels
        step.prepare()
        for _ in range(3):
            step.call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    step.prepare()
    with torch.cuda.graph(graph):
        held = step.call()

    def replay(_: object = held) -> None:  # the outputs' memory must not be given away
        graph.replay()

    return Step(replay, step.prepare, step.most)
