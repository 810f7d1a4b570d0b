"""What a model is asked to do while it is timed: a grid of batch sizes and lengths, and one token with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.tracing.probes import quiet
from normconvert.tracing.probes.choose import Guess, is_timm, ranked, specs
from normconvert.tracing.probes.facts import Facts
from normconvert.tracing.probes.specs import Spec, materialise

BATCHES = (1, 8)
LENGTHS = (32, 512)
STEPS = 32
"""Tokens that may be decoded after a prompt before its cache is set back."""


@dataclass(frozen=True)
class Workload:
    """One cell of the grid.

    Attributes:
        kind: ``forward``, or ``decode``: one more token after ``length`` others, with their cache.
        batch: rows.
        length: tokens in a row; None for a model without text.
        inputs: keyword arguments on the CPU; for ``decode`` those of the prompt.
    """

    kind: str
    batch: int
    length: int | None
    inputs: dict[str, Any]

    @property
    def name(self) -> str:
        """For tables: ``forward 8 × 512``."""
        return f"{self.kind} {self.batch}" + (f" × {self.length}" if self.length is not None else "")


def grid(
    model: nn.Module, batches: Sequence[int] | None = None, lengths: Sequence[int] | None = None, decode: bool = True
) -> list[Workload]:
    """The workloads for a model.

    Args:
        model: on any device, the meta device included; nothing is computed. Its config is told to use no cache.
        batches: rows; None takes 1 and 8.
        lengths: tokens; None takes 32 and 512, or what the model can take.
        decode: for a causal language model also one token after the shortest length.

    Raises:
        InputError: a number that makes no sense, or lengths for a model without text, or longer than it can take.
        TraceError: no input is known for this model.
    """
    for name, numbers in (("batch", batches), ("length", lengths)):
        if numbers is not None and (not numbers or min(numbers) < 1):
            raise InputError(f"{name} is {list(numbers)}; expected numbers from 1 on")
    with quiet():
        guess, _ = next(ranked(model))
    text, limit = _takes_text(model, guess), _longest(model)
    if not text:
        if lengths is not None:
            raise InputError(f"{type(model).__name__} takes no text: its inputs have no length to choose")
        return [_forward(model, guess, batch, None) for batch in batches or BATCHES]
    if lengths is None:
        lengths = sorted({min(length, limit) for length in LENGTHS})
    elif max(lengths) > limit:
        raise InputError(f"length {max(lengths)} is more than the {limit} tokens that {type(model).__name__} can take")
    cells = []
    for batch in batches or BATCHES:
        if decode and can_decode(model) and limit > STEPS:
            # Room for the tokens that follow the prompt before the cache is set back.
            cells.append(replace(_forward(model, guess, batch, min(*lengths, limit - STEPS)), kind="decode"))
        cells += [_forward(model, guess, batch, length) for length in lengths]
    return cells


def can_decode(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers that writes token after token with a cache."""
    if is_timm(model):
        return False
    can_generate: Any = getattr(model, "can_generate", None)
    names = Facts(model).parameters
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    wanted = {"input_ids", "use_cache", cache_name(model)}
    return bool(can_generate and can_generate() and not encoder and wanted <= set(names))


def cache_name(model: nn.Module) -> str:
    """What the model calls its cache, as an argument and as an output; transformers 5.24 renamed it."""
    return "cache" if "cache" in Facts(model).parameters else "past_key_values"


def _takes_text(model: nn.Module, guess: Guess) -> bool:
    """Whether the inputs change with the length of the text."""
    one, other = (_shapes(specs(model, guess.names, replace(guess.sizes, length=n))) for n in (8, 9))
    return one != other


def _shapes(made: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in made.items() if isinstance(value, Spec)}


def _longest(model: nn.Module) -> int:
    """Tokens that the model has positions for."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_sequence_length")
    limit = Facts(model).number(*names, part="text")
    return limit if limit > 0 else 1 << 30


def _forward(model: nn.Module, guess: Guess, batch: int, length: int | None) -> Workload:
    sizes = replace(guess.sizes, batch=batch, length=length or guess.sizes.length)
    # The same values in every run: experts are chosen by them.
    generator = torch.Generator().manual_seed(0)
    made = specs(model, guess.names, sizes)
    inputs = {name: materialise(v, generator) if isinstance(v, Spec) else v for name, v in made.items()}
    if can_decode(model) and "logits_to_keep" in Facts(model).parameters:
        inputs["logits_to_keep"] = 1  # as `generate` reads a prompt
    return Workload("forward", batch, length, inputs)


def on_device(inputs: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The inputs as a model of this dtype and on this device takes them."""
    return dict(_moved(inputs, dtype, device))


def _moved(inputs: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Any]]:
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            yield name, value.to(device, dtype if value.is_floating_point() else value.dtype)
        else:
            yield name, value
