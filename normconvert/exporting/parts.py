"""What becomes one file: a function of named tensors that returns named tensors, with inputs to try it on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.exporting.examples import Axes, Examples

Named = list[tuple[str, Tensor]]

PRESENT = "present"
"""How the names of keys and values among the outputs begin."""


@dataclass(frozen=True)
class Part:
    """One file to be.

    Attributes:
        name: of the file in a folder, without its suffix.
        model: whose tensors it holds.
        call: named tensors -> named tensors; everything else is fixed.
        inputs: the tensors to trace it with, in the order of its arguments.
        axes: input -> axis -> what it is, of those that may vary.
        checks: inputs of other sizes.
        outputs: names of what it returns.
    """

    name: str
    model: nn.Module
    call: Callable[[dict[str, Tensor]], Named]
    inputs: dict[str, Tensor]
    axes: Axes
    checks: Sequence[Mapping[str, Tensor]]
    outputs: list[str] = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            object.__setattr__(self, "outputs", [name for name, _ in self.call(dict(self.inputs))])

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model itself returns."""
        with torch.no_grad():
            return [value for _, value in self.call(dict(inputs))]

    def module(self) -> nn.Module:
        """The same as a module whose forward takes the inputs by position."""
        return _Function(self).eval()


class _Function(nn.Module):
    """torch.export takes a module, and names the inputs of its program as the signature does."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.model = part.model
        names = [identifier(name) for name in part.inputs]

        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(value for _, value in part.call(dict(zip(part.inputs, tensors, strict=True))))

        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        self.forward = forward


def identifier(name: str) -> str:
    """The name of an input as Python can have it: ``past_key_values.0.key`` is none."""
    return name.replace(".", "_")


def whole(model: nn.Module, found: Examples) -> Part:
    """The model as it is called."""

    def call(inputs: dict[str, Tensor]) -> Named:
        return floating(model(**inputs, **found.fixed))

    return Part("model", model, call, found.inputs, found.axes, found.checks)


def floating(output: Any, name: str = "") -> Named:
    """The floating tensors of an output, with names as paths; caches and the like are left out."""
    if isinstance(output, Tensor):
        # Integers, such as chosen tokens, have no relative error.
        return [(name or "output", output)] if output.is_floating_point() else []
    if isinstance(output, dict):
        within = f"{name}." if name else ""
        items = [(f"{within}{key}", value) for key, value in output.items() if "past_key_values" not in str(key)]
    elif isinstance(output, (tuple, list)):
        items = [(f"{name or 'output'}_{i}", value) for i, value in enumerate(output)]
    else:
        items = []
    return [found for key, value in items for found in floating(value, key)]
