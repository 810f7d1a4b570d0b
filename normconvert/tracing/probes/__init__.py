"""Inputs for a model that nobody described: to trace it with, and to compare two of its versions on.

They are guessed from ``forward``'s signature, ``main_input_name`` and the config, by a table from argument name to
builder (:mod:`normconvert.tracing.probes.builders`); no model is named anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from normconvert.tracing.calls import given_calls
from normconvert.tracing.probes.asking import quiet
from normconvert.tracing.probes.builders import BUILDERS
from normconvert.tracing.probes.choose import SIZES, answered, guesses, is_timm, ranked, to_trace
from normconvert.tracing.probes.examples import example_probes
from normconvert.tracing.probes.facts import Facts
from normconvert.tracing.probes.verification import Probe, guessed_probes

OPTIONAL = ("bool_masked_pos", "mask_time_indices")
"""Arguments that make a model use parameters which it leaves alone without them."""

__all__ = [
    "OPTIONAL",
    "Probe",
    "further_inputs",
    "likely_inputs",
    "optional_input",
    "quiet",
    "trace_inputs",
    "trace_inputs_candidates",
    "verification_inputs",
]


def likely_inputs(model: nn.Module) -> dict[str, Any] | None:
    """The first keyword arguments that :func:`trace_inputs_candidates` would try, untried; None if there are none.

    Raises:
        TraceError: a required argument of ``forward`` has no row in the table.
    """
    guess = next(guesses(model), None)
    return None if guess is None else to_trace(model, guess.specs)


def trace_inputs_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments on the CPU to try in turn, the likely first; at most a few.

    Args:
        model: a transformers or timm model on the meta device. ``config.use_cache`` is set to False on it.

    Raises:
        TraceError: a required argument of ``forward`` has no row in the table.
    """
    for guess, _ in ranked(model):
        yield to_trace(model, guess.specs)


def trace_inputs(model: nn.Module) -> dict[str, Any]:
    """The first of :func:`trace_inputs_candidates` that the model's forward takes (tried in torch's fake mode).

    Where every guess is stopped only by a value that tracing does not know, the first such; else the first of all.

    Raises:
        TraceError: a required argument of ``forward`` has no row in the table.
    """
    guess, _ = next(ranked(model))
    return to_trace(model, guess.specs)


def further_inputs(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Other ways to call a model that takes ``inputs``: with patches masked out, then other sets of arguments, a few.

    Args:
        model: on the meta device.
        inputs: keyword arguments that its forward takes.
    """
    if is_timm(model):
        return
    facts, tried = Facts(model), {frozenset(inputs)}
    for name in OPTIONAL:
        if name in facts.parameters and name not in inputs and frozenset([*inputs, name]) not in tried:
            tried.add(frozenset([*inputs, name]))
            yield {**inputs, name: optional_input(model, name)}
    done: set[tuple[str, ...]] = set()
    for guess, answer in answered(model, done):
        known = frozenset(guess.specs) in tried
        if known or answer in ("yes", "maybe"):
            done.add(tuple(guess.names))
        if not known and answer in ("yes", "maybe"):
            tried.add(frozenset(guess.specs))
            yield to_trace(model, guess.specs)


def optional_input(model: nn.Module, name: str) -> Any:
    """What to give for one of :data:`OPTIONAL`, on the CPU."""
    return to_trace(model, {name: BUILDERS[name](Facts(model), SIZES[0])})[name]


def verification_inputs(
    model: nn.Module, *, seed: int = 0, tokenizer: Any | None = None, level: str = "thorough"
) -> list[Probe]:
    """Two to a dozen small probes, the same for the same model and seed.

    Args:
        model: on any device, the meta device included; only its signature, config and shapes are read.
        seed: of all random values.
        tokenizer: of the model; if given, probes hold real sentences (names ``text-0``, ``text-1``).
        level: ``quick``, ``standard`` or ``thorough``.

    Raises:
        TraceError: no input is known for this model.
    """
    if calls := given_calls(model):
        return example_probes(calls, seed=seed, level=level)
    return guessed_probes(model, seed=seed, tokenizer=tokenizer, level=level)
