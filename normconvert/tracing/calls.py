"""How a model that nobody knows is called: example inputs, as the keyword arguments that its ``forward`` is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.compat.torch import pytree
from normconvert.errors import InputError

Call = dict[str, Any]
"""Keyword arguments of ``forward``; tensors are on the CPU."""

_GIVEN = "normconvert_calls"
"""The attribute of a model that was made here, and is told how it is called."""
EXPECTED = "expected a tuple, a dict of keyword arguments, or a list of these for several calls"


def calls_of(model: nn.Module, example_inputs: Any) -> tuple[Call, ...]:
    """The calls that example inputs stand for.

    Args:
        model: its signature is read.
        example_inputs: a tuple of arguments, a mapping of keyword arguments, one tensor, or a list of these.

    Raises:
        InputError: they are none of these, or ``forward`` does not take them.
    """
    examples = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not examples:
        raise InputError(f"example_inputs: an empty list; {EXPECTED}")
    return tuple(_call(model, one) for one in examples)


def _call(model: nn.Module, example: Any) -> Call:
    name = type(model).__name__
    signature = inspect.signature(model.forward)
    try:
        if isinstance(example, Mapping):
            signature.bind(**example)
            given = {str(key): value for key, value in example.items()}
        elif isinstance(example, (tuple, Tensor)):
            given = dict(signature.bind(*((example,) if isinstance(example, Tensor) else example)).arguments)
        else:
            raise InputError(f"example_inputs: found {type(example).__name__}; {EXPECTED}")
    except TypeError as error:
        raise InputError(f"example_inputs do not fit {name}.forward{signature}: {error}") from error
    for parameter in signature.parameters.values():
        if parameter.name in given and parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise InputError(
                f"{name}.forward takes {parameter.name!r} by its position: wrap the model in one whose forward names "
                "its arguments"
            )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(given)):
        raise InputError("example_inputs hold no tensor")
    found: Call = pytree.tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, given)
    return found


def give_calls(model: nn.Module, calls: tuple[Call, ...]) -> None:
    """Note with a model that nobody else has how it is called; copies of it keep that."""
    vars(model)[_GIVEN] = calls


def given_calls(model: nn.Module) -> tuple[Call, ...]:
    """What :func:`give_calls` noted; empty where a library's models tell it themselves."""
    found: tuple[Call, ...] = vars(model).get(_GIVEN, ())
    return found


def in_dtype(call: Call, dtype: torch.dtype) -> Call:
    """The call with its floating tensors in ``dtype``."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    found: Call = pytree.tree_map(cast, call)
    return found


def without_values(inputs: Mapping[str, Any], device: torch.device | str = "meta") -> dict[str, Any]:
    """The inputs as a model gets them while it is traced: every tensor without values."""

    def empty(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, Tensor) else value

    found: dict[str, Any] = pytree.tree_map(empty, dict(inputs))
    return found
