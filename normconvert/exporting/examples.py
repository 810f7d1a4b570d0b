"""Inputs of a model to export it with and to check the file on, and which of their axes are the same quantity.

An axis is named by what moves it: the inputs are described at two lengths, say, and the axes that differ are lengths.
No model is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError, TraceError
from normconvert.tracing.probes.builders import BUILDERS
from normconvert.tracing.probes.choose import floating_dtype, is_timm, ranked, specs
from normconvert.tracing.probes.facts import Facts, Sizes
from normconvert.tracing.probes.specs import Spec, materialise

Axes = Mapping[str, Mapping[int, str]]
"""Input -> axis -> name of the quantity."""

MASK, TYPES, POSITIONS = "attention_mask", "token_type_ids", "position_ids"
USUAL = (MASK, TYPES)
"""Companions of token ids that a batch of real texts comes with."""
TEXTS = {"": "input_ids", "decoder_": "decoder_input_ids"}
"""Prefix of a companion -> the ids that it goes with."""


@dataclass(frozen=True)
class Examples:
    """How to call a model.

    Attributes:
        inputs: tensors, in the order of the exported file's arguments; the batch and lengths are 2 or more, since a
            size of 1 would be taken for a constant.
        fixed: other keyword arguments, which become part of the file.
        axes: which axes may vary, and what they are.
        checks: inputs of other sizes and with masks, which the model runs on.
    """

    inputs: dict[str, Tensor]
    fixed: dict[str, Any]
    axes: Axes
    checks: list[dict[str, Tensor]] = field(default_factory=list)


def examples(model: nn.Module, chosen: Sequence[str], source: str) -> Examples:
    """How the model is usually called, or with the arguments that are ``chosen``.

    Raises:
        InputError: the model has no such argument, or no example of it is known.
        TraceError: the model runs on none of the examples.
    """
    guess, _ = next(ranked(model))
    facts = Facts(model)
    names = list(chosen) or list(guess.names)
    for name in names:
        if name not in facts.parameters:
            raise InputError(f"{source}: no input {name!r}; forward takes {', '.join(facts.parameters)}")
        if name not in BUILDERS and _text_of(name) is None:
            raise InputError(f"{source}: no example is known for the input {name!r}")
    sizes = replace(guess.sizes, batch=3 if guess.sizes.batch > 1 else 1)
    call = Caller(model, names)
    inputs = call.accepted(sizes)
    for name in () if chosen or is_timm(model) else USUAL:
        usual = name != TYPES or facts.number("type_vocab_size")
        if usual and name in facts.parameters and name not in call.names and "input_ids" in call.names:
            with_it = Caller(model, [*call.names, name])
            if (found := with_it.accepted(sizes, quiet=True)) is not None:
                call, inputs = with_it, found
    assert inputs is not None
    axes = {name: dict(call.axes(name, inputs, sizes)) for name in inputs}
    checks = [found for one in call.others(inputs, axes, sizes) if (found := call.tried(one)) is not None]
    return Examples(inputs, call.fixed, _moving(axes, [inputs, *checks]), checks)


def _moving(axes: Axes, calls: Sequence[Mapping[str, Tensor]]) -> Axes:
    """The axes that had two sizes in calls that the model took: what it was not seen to allow is not promised."""
    return {
        name: {axis: what for axis, what in found.items() if len({call[name].shape[axis] for call in calls}) > 1}
        for name, found in axes.items()
    }


def _text_of(name: str) -> str | None:
    """The token ids that an argument goes with by its name."""
    prefix = "decoder_" if name.startswith("decoder_") else ""
    return TEXTS[prefix] if name.removeprefix(prefix) in (MASK, TYPES, POSITIONS) else None


class Caller:
    """A model with the names of the arguments that it is given."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names, self.facts = model, list(dict.fromkeys(names)), Facts(model)
        self.fixed: dict[str, Any] = {}

    def accepted(self, sizes: Sizes, *, quiet: bool = False) -> dict[str, Tensor] | None:
        """Inputs that the model runs on; None if it does not, and that is no error."""
        made = self.make(sizes, seed=1)
        try:
            with torch.no_grad():
                self.model(**made, **self.fixed)
        except Exception as error:  # a model may refuse in any way
            if quiet:
                return None
            from normconvert.exporting.failures import why

            raise TraceError(f"the model does not run on {', '.join(made)}: {why(error, self.model)}") from error
        return made

    def tried(self, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The inputs, if the model takes them."""
        try:
            with torch.no_grad():
                self.model(**inputs, **self.fixed)
        except Exception:  # as above
            return None
        return inputs

    def make(self, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Tensors of these sizes, signals in the model's dtype, masks of ones."""
        generator = torch.Generator().manual_seed(seed)
        known = [name for name in self.names if _text_of(name) is None]
        described = specs(self.model, known, sizes)
        tensors = {k: materialise(v, generator) for k, v in described.items() if isinstance(v, Spec)}
        self.fixed = {k: v for k, v in described.items() if not isinstance(v, Spec)}
        for name in self.names:
            text = tensors.get(_text_of(name) or "")
            if text is not None:
                tensors[name] = self._companion(name, text.shape[:2], generator)
            elif _text_of(name) is not None and name in BUILDERS:
                tensors[name] = materialise(BUILDERS[name](self.facts, sizes), generator)
        dtype = floating_dtype(self.model)
        order = [name for name in (*self.facts.parameters, *tensors) if name in tensors]
        return {
            name: tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name]
            for name in dict.fromkeys(order)
        }

    def _companion(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if name.endswith(POSITIONS):
            return torch.arange(shape[1]).expand(shape).contiguous()
        if name.endswith(TYPES):
            return torch.randint(0, max(self.facts.number("type_vocab_size", default=1), 1), shape, generator=generator)
        return torch.ones(shape, dtype=torch.int64)

    def axes(self, name: str, inputs: Mapping[str, Tensor], sizes: Sizes) -> Iterator[tuple[int, str]]:
        """Which axes of an input move with which quantity."""
        shape = inputs[name].shape
        moved = {
            "batch": replace(sizes, batch=sizes.batch + 1),
            "length": replace(sizes, length=sizes.length + 2),
            "image": replace(sizes, image=_side(inputs) + 32),
            "samples": replace(sizes, samples=sizes.samples * 2),
            "frames": replace(sizes, frames=(sizes.frames or 64) * 2 + 8),
        }
        done: set[int] = set()
        for quantity, other in moved.items():
            if quantity == "batch" and sizes.batch == 1:
                continue
            try:
                found = self.make(other, seed=1)[name].shape
            except Exception:  # no input of that size can be described
                continue
            if len(found) != len(shape):
                continue
            differing = [i for i in range(len(shape)) if found[i] != shape[i] and i not in done]
            done.update(differing)
            if quantity == "image" and len(differing) == 2:
                yield from zip(differing, ("height", "width"), strict=True)
                continue
            for axis in differing:
                yield axis, f"decoder_{quantity}" if quantity == "length" and "decoder" in name else quantity

    def others(self, inputs: Mapping[str, Tensor], axes: Axes, sizes: Sizes) -> Iterator[dict[str, Tensor]]:
        """Inputs of other sizes, some padded; the model may refuse some of them."""
        batch, length, side = sizes.batch, sizes.length, _side(inputs)
        yield self.make(sizes, seed=2)
        if batch > 1:
            yield self.make(replace(sizes, batch=1), seed=3)
            yield self.make(replace(sizes, batch=5), seed=4)
        quantities = {name for found in axes.values() for name in found.values()}
        for other, rows, side_padded in ((1, 2, ""), (length + 4, 2, "right"), (length + 6, 4, "left")):
            if quantities & {"length", "decoder_length"}:
                yield padded(self.make(replace(sizes, length=other, batch=min(rows, batch)), seed=other), side_padded)
        if "height" in quantities:
            for image in (max(side - 32, 32), side + 32):
                yield self.make(replace(sizes, image=image, batch=min(2, batch)), seed=image)
            yield {
                k: torch.randn(*v.shape[:-1], v.shape[-1] + 32).to(v.dtype) if "width" in axes[k].values() else v
                for k, v in self.make(replace(sizes, image=side + 32), seed=5).items()
            }
        for count in (96, 200) if "frames" in quantities else ():
            yield self.make(replace(sizes, frames=count, batch=min(2, batch)), seed=count)
        for count in (4000, 5120) if "samples" in quantities else ():
            yield self.make(replace(sizes, samples=count, batch=min(2, batch)), seed=count)


def _side(inputs: Mapping[str, Tensor]) -> int:
    """The side of the images among the inputs."""
    return next((v.shape[-1] for v in inputs.values() if v.is_floating_point() and v.ndim >= 4), 64)


def padded(inputs: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The same with a third of the first text masked on one side, if there is a mask."""
    for name, value in inputs.items():
        count = value.shape[-1] // 3
        if side and name.endswith(MASK) and value.ndim == 2 and count:
            value[0, -count:] = 1 if side == "left" else 0
            value[0, :count] = 1 if side == "right" else 0
    return inputs
