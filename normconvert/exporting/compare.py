"""Is a file the model? Both are run on the inputs that it was traced with and on others, and their outputs compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normconvert.errors import FidelityError, first_line
from normconvert.exporting.capture import Captured
from normconvert.exporting.engines import Run
from normconvert.exporting.examples import MASK
from normconvert.exporting.failures import ESCAPES
from normconvert.exporting.parts import PRESENT, Part
from normconvert.verification import fidelity

TOLERANCE = 1e-4
"""Relative error in float32: other kernels add up in another order, over all layers."""
HALVES = 4.0
"""In 16 bits a file may be so many times as far from the float32 model as torch in 16 bits is."""


@dataclass(frozen=True)
class Compared:
    """How close a file is.

    Attributes:
        error: largest relative error over inputs and outputs.
        allowed: how large it may be.
        sizes: how many inputs it was run on.
        least: quantity -> its smallest size among them.
    """

    error: float
    allowed: float
    sizes: int
    least: dict[str, int]


def fitting(part: Part, captured: Captured) -> list[Mapping[str, Tensor]]:
    """The inputs whose sizes the program takes: what is not free is as it was traced."""
    found: list[Mapping[str, Tensor]] = [part.inputs]
    for check in part.checks:
        same = all(
            value.shape[axis] == part.inputs[name].shape[axis]
            for name, value in check.items() for axis in range(value.ndim) if axis not in captured.free.get(name, {})
        )  # fmt: skip
        if same and all(_within(captured, name, value) for name, value in check.items()):
            found.append(check)
    return found


def _within(captured: Captured, name: str, value: Tensor) -> bool:
    """Whether sizes are below the limits that the program states."""
    most = {axis: captured.ranges.get(what, (0, None))[1] for axis, what in captured.free.get(name, {}).items()}
    return all(limit is None or value.shape[axis] <= limit for axis, limit in most.items())


def compare(run: Run, part: Part, captured: Captured) -> Compared:
    """Run the file and the model on everything that fits.

    Raises:
        FidelityError: the file does not run, or is further off than is allowed.
    """
    checks = fitting(part, captured)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in part.model.parameters())
    truth = widened(part, checks) if half else [part.run(check) for check in checks]
    truth = [attended(part, check, known) for check, known in zip(checks, truth, strict=True)]
    allowed = TOLERANCE
    if half:
        allowed += HALVES * max(
            distance(attended(part, check, part.run(check)), known) for check, known in zip(checks, truth, strict=True)
        )
    worst, least = 0.0, dict[str, int]()
    for check, known in zip(checks, truth, strict=True):
        try:
            found = run(check)
        except Exception as error:  # whatever an engine raises: the file does not do its work
            said = ESCAPES.sub("", first_line(error))[:300]
            raise FidelityError(f"the exported file does not run on {_sizes(check)}: {said}") from error
        off = distance(attended(part, check, found), known)
        # Not `>`: NaN is not close either.
        if not off <= allowed:
            raise FidelityError(
                f"the exported file is {off:.2g} off the model on {_sizes(check)} (allowed {allowed:.2g})"
            )
        worst = max(worst, off)
        for name, axes in captured.free.items():
            for axis, what in axes.items():
                size = check[name].shape[axis]
                least[what] = min(size, least.get(what, size))
    return Compared(worst, allowed, len(checks), least)


def _sizes(inputs: Mapping[str, Tensor]) -> str:
    shown = [f"{name} {tuple(value.shape)}" for name, value in inputs.items()]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def widened(part: Part, checks: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
    """What the model returns in float32."""
    parameters = [(parameter, parameter.data) for parameter in part.model.parameters()]
    buffers = [
        (owner, name, value) for owner in part.model.modules() for name, value in owner.named_buffers(recurse=False)
    ]
    part.model.float()
    try:
        return [part.run({k: v.float() if v.is_floating_point() else v for k, v in check.items()}) for check in checks]
    finally:
        # The tensors themselves: of several dtypes each keeps its own, since the model may be written once more.
        for parameter, data in parameters:
            parameter.data = data
        for owner, name, value in buffers:
            setattr(owner, name, value)


def attended(part: Part, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs with zeros at padded tokens: attention over nothing is whatever an engine makes of it.

    No other token attends to those, and nobody reads them.
    """
    mask = inputs.get(MASK)
    # Another number of outputs is no export, which is for :func:`distance` to say.
    known = len(outputs) == len(part.outputs) and "input_ids" in inputs and "decoder_input_ids" not in inputs
    if mask is None or mask.ndim != 2 or not known:
        return list(outputs)
    found = []
    for name, value in zip(part.outputs, outputs, strict=True):
        axis, count = (2, mask.shape[1]) if name.startswith(PRESENT) else (1, inputs["input_ids"].shape[1])
        if value.ndim > axis and value.shape[0] == mask.shape[0] and value.shape[axis] == count:
            shape = [1] * value.ndim
            shape[0], shape[axis] = mask.shape[0], count
            value = value.masked_fill(mask[:, mask.shape[1] - count :].view(shape) == 0, 0)
        found.append(value)
    return found


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the outputs; infinite where one is missing or has another shape."""
    if len(found) != len(expected):
        return float("inf")
    offs = [fidelity.distance(a, b).relative for a, b in zip(found, expected, strict=True)]
    return max((off if off == off else float("inf") for off in offs), default=0.0)
