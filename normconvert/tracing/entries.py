"""What a call of a model runs: all of it, a module within it, a method of features, or all with more for one part.

A part may take an argument that nothing gives it: the backbone of a depth estimator can mask patches, and the whole
cannot ask for it. The tensor that stands for such patches is in the checkpoint, and where it goes is only seen in a
call that gives the part its argument. That must be no value that could be a stream's: what is invented in its place
shows who writes into a stream and not who reads one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

BETWEEN = ":"
"""Between the path of a part and the name of its argument; no path of a module that is an attribute has it."""


def entry_of_part(path: str, argument: str) -> str:
    """The entry of a call of the whole model that gives ``argument`` to the part at ``path``."""
    return f"{path}{BETWEEN}{argument}"


def is_whole(entry: str) -> bool:
    """Whether a call runs the whole model, whose outputs are the model's then."""
    return not entry or BETWEEN in entry


def entered(model: nn.Module, entry: str) -> Callable[..., Any]:
    """What a call runs.

    Args:
        model: the whole.
        entry: path of a module, name of a method, :func:`entry_of_part`, or empty.
    """
    path, between, argument = entry.partition(BETWEEN)
    if not between:
        found: Callable[..., Any] = operator.attrgetter(entry)(model) if entry else model.forward
        return found
    part, forward = model.get_submodule(path), model.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        value = kwargs.pop(argument)
        handle = part.register_forward_pre_hook(lambda _, a, k: (a, {**k, argument: value}), with_kwargs=True)
        try:
            return forward(*args, **kwargs)
        finally:
            handle.remove()

    # Export takes the names of the inputs from the signature.
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY))
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    return run


def parts_that_take(model: nn.Module, argument: str, tensors: Collection[str]) -> Iterator[str]:
    """The innermost modules that hold some of ``tensors``, and whose forward takes ``argument``, though it need not."""
    left = set(tensors)
    for path, module in sorted(model.named_modules(), key=lambda item: -item[0].count(".")):
        parameter = None
        with contextlib.suppress(TypeError, ValueError):  # a compiled module has no signature
            parameter = inspect.signature(module.forward).parameters.get(argument)
        if path and parameter is not None and parameter.default is None:
            held = {name for name in left if name.startswith(f"{path}.")}
            left -= held
            if held:
                yield path
