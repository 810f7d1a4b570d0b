"""Inputs to compare two versions of a model on: a few small ones, each after another kind of mistake.

The level says how many. ``thorough`` makes one probe of each recipe. ``standard`` looks for the same mistakes in fewer
runs: one signal whose areas are noise, constant, zero and small stands for one probe of each, one batch holds a text
that is padded on the left and one on the right. ``quick`` makes two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.compat.transformers import token_ids
from normconvert.errors import InputError
from normconvert.runtime import one_at_a_time
from normconvert.tracing.probes.choose import Guess, accepts, is_timm, ranked, specs
from normconvert.tracing.probes.entrances import entrances
from normconvert.tracing.probes.facts import Facts
from normconvert.tracing.probes.specs import SIGNALS, Spec, materialise, place_tokens

LONGEST = 32
"""Tokens of the longest text."""
ALL = frozenset({"quick", "standard", "thorough"})
STANDARD, THOROUGH = ALL - {"quick"}, frozenset({"thorough"})
HEAVY = 100_000
"""Numbers in the signals of one sample (a picture of 224 x 224 has 150,528) from which on samples are few."""

SENTENCES = (
    "The keeper of the lighthouse counted the ships every evening and wrote their names in a green book.",
    "If 3 of 12 eggs break, how many are left? Nine; but nobody asked the hen, who had laid them on a Tuesday.",
)
"""Written for this file."""


@dataclass(frozen=True)
class Probe:
    """One call of the model.

    Attributes:
        name: for the report; text probes begin with ``text``.
        inputs: keyword arguments on the CPU: signals in float32, integers in int64, plain values as they are.
        realistic: like what the model gets in use, so that rounding errors on it tell something. On a degenerate or
            extreme input the original's may be zero by structure.
    """

    name: str
    inputs: dict[str, Any]
    realistic: bool = True


@dataclass(frozen=True)
class Recipe:
    """How a probe differs from the model's usual input.

    Attributes:
        name: of the probe.
        applies: ``text``, ``signal`` or ``any``: what the model must take for the probe to make sense.
        batch, length: None leaves the usual.
        ids: what token ids become; None leaves them random.
        signal: what images and sounds become; None leaves them gaussian.
        padding: the side on which the attention mask pads, if any; ``both``: one row each.
        realistic: see :class:`Probe`.
        levels: of the verification that have it.
        heavy: it is made where one sample is large, too.
    """

    name: str
    applies: str = "any"
    batch: int | None = None
    length: int | None = None
    ids: Callable[[Tensor, Spec], Tensor] | None = None
    signal: Callable[[Tensor], Tensor] | None = None
    padding: str | None = None
    realistic: bool = True
    levels: frozenset[str] = THOROUGH
    heavy: bool = False


def _degenerate(ids: Tensor, spec: Spec) -> Tensor:
    """Rows all equal: to an ordinary id, to zero, to the largest id, in turn."""
    values = torch.tensor([(spec.low + spec.high) // 2, 0, spec.high - 1])[torch.arange(len(ids)) % 3]
    return values.view(-1, *[1] * (ids.ndim - 1)).expand_as(ids).clone()


def _areas(signal: Tensor) -> Tensor:
    """Quarters along each of the last two axes in turn: as it was, a constant, zeros, a hundredth of it."""
    result = signal.clone()
    for axis in {max(signal.ndim - 2, 0), signal.ndim - 1} if signal.ndim else ():
        quarter = signal.shape[axis] // 4
        if quarter:
            result.narrow(axis, 0, quarter).fill_(1.0)
            result.narrow(axis, quarter, quarter).zero_()
            result.narrow(axis, 2 * quarter, quarter).mul_(0.01)
    return result


RECIPES: tuple[Recipe, ...] = (
    Recipe("random", levels=ALL, heavy=True),
    Recipe("single", batch=1),
    Recipe("long", "text", batch=1, length=LONGEST, levels=STANDARD),
    Recipe("one-token", "text", length=1, realistic=False, levels=STANDARD),
    Recipe("degenerate", "text", batch=3, ids=_degenerate, realistic=False, levels=STANDARD),
    Recipe("padded", "text", length=12, padding="both", levels=ALL - THOROUGH),
    Recipe("padded-right", "text", length=12, padding="right"),
    Recipe("padded-left", "text", length=12, padding="left"),
    Recipe("areas", "signal", batch=1, signal=_areas, ids=_degenerate, realistic=False, levels=ALL, heavy=True),
    Recipe("constant", "signal", signal=torch.ones_like, realistic=False),
    Recipe("zero", "signal", batch=1, signal=torch.zeros_like, realistic=False),
    Recipe("large", "signal", signal=lambda x: 100.0 * x, realistic=False),
    Recipe("small", "signal", batch=1, signal=lambda x: 0.01 * x, realistic=False),
)
"""Degenerate ids and constant images make rows alike; large and small signals hide and show a norm's eps."""


@one_at_a_time
def guessed_probes(
    model: nn.Module, *, seed: int = 0, tokenizer: Any | None = None, level: str = "thorough"
) -> list[Probe]:
    """Two to a dozen small probes, the same for the same model and seed.

    Args:
        model: on any device, the meta device included; only its signature, config and shapes are read.
        seed: of all random values; probe number i uses ``seed * 1000 + i``.
        tokenizer: of the model; if given, probes hold real sentences (names ``text-0``, ``text-1``).
        level: ``quick``, ``standard`` or ``thorough``.

    Returns:
        Probes with CPU tensors: text at most 32 tokens, plus placeholders where the model wants them.

    Raises:
        TraceError: no input is known for this model.
    """
    guess, _ = next(ranked(model))
    kinds = {value.kind for value in guess.specs.values() if isinstance(value, Spec)}
    text, signal = "ids" in kinds, bool(kinds & SIGNALS)
    probes = []
    heavy = _values_of_one(guess) > HEAVY and level != "thorough"
    for number, recipe in enumerate(_recipes(text, signal, level, heavy)):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        inputs = _make(model, guess, replace(recipe, batch=1) if heavy else recipe, generator)
        if inputs is not None:
            probes.append(Probe(recipe.name, inputs, recipe.realistic))
    if tokenizer is not None and text and not (heavy or level == "quick"):
        probes += _text_probes(model, guess, tokenizer, seed, 1 if level == "standard" else len(SENTENCES))
    if level == "quick":
        return probes[:2]
    # Where a sample is large, one that is not realistic comes in by the other door and not by both.
    found = _embedding_probes(model, probes[-1:] if heavy else probes, seed, tried=level == "thorough")
    return probes[:-1] + found if heavy and found and len(probes) > 1 else probes + found


def _values_of_one(guess: Guess) -> int:
    """Numbers in the signals of one sample."""
    shapes = [v.shape for v in guess.specs.values() if isinstance(v, Spec) and v.kind in SIGNALS]
    return sum(math.prod(shape) // max(guess.sizes.batch, 1) for shape in shapes)


def _embedding_probes(model: nn.Module, probes: list[Probe], seed: int, *, tried: bool) -> list[Probe]:
    """The first probe with embeddings in place of what they are made of, in float32; one for each such argument.

    Of several forms of an argument the first that a try on fake tensors accepts is taken. That takes as long as a run,
    so without `tried` a single form is left to the verification, which runs it.
    """
    found: list[Probe] = []
    done: set[str] = set()
    for alternatives in entrances(model, probes[0].inputs, seed=seed) if probes else ():
        known = not tried and len(alternatives) == 1 and len(alternatives[0].names) == 1
        entrance = next((e for e in alternatives if known or accepts(model, e.inputs) in ("yes", "maybe")), None)
        if entrance is None or done.issuperset(entrance.names):
            continue
        done.update(entrance.names)
        inputs = {k: v.float() if k in entrance.names else v for k, v in entrance.inputs.items()}
        found.append(Probe("embeds" if not found else f"embeds-{len(found)}", inputs, realistic=False))
    return found


def _recipes(text: bool, signal: bool, level: str, heavy: bool) -> Iterator[Recipe]:
    """The recipes that apply; for a model with both kinds of input, and where a sample is large, fewer."""
    for recipe in RECIPES:
        if level not in recipe.levels or (heavy and not recipe.heavy):
            continue
        if recipe.applies == "any" or (recipe.applies == "text" and text) or (recipe.applies == "signal" and signal):
            if text and signal and recipe.name in ("single", "zero", "small", "padded-left"):
                continue
            if text and not signal and recipe.name == "single":
                continue
            yield recipe


def _make(model: nn.Module, guess: Guess, recipe: Recipe, generator: torch.Generator) -> dict[str, Any] | None:
    """The recipe's inputs; None if the model cannot take it."""
    facts = Facts(model)
    length = recipe.length or guess.sizes.length
    limit = facts.number(
        "max_position_embeddings", "n_positions", "max_target_positions", part="text", default=LONGEST * 2
    )
    if length > LONGEST // 2:
        length = min(length, max(limit // 2, 1))
    if guess.sizes.length > 7:  # the model wants long texts
        if recipe.length is not None and recipe.length < guess.sizes.length:
            return None
        length = max(length, guess.sizes.length)
    sizes = replace(guess.sizes, batch=min(recipe.batch or guess.sizes.batch, 3), length=length)
    if guess.sizes.batch == 1:
        sizes = replace(sizes, batch=1)
    made = specs(model, guess.names, sizes)
    inputs = {
        name: _value(value, recipe, generator) if isinstance(value, Spec) else value for name, value in made.items()
    }
    if recipe.padding is not None:
        if is_timm(model) or "attention_mask" not in facts.parameters or "input_ids" not in inputs:
            return None
        inputs["attention_mask"] = padding_mask(inputs["input_ids"].shape, recipe.padding)
    return inputs


def _value(spec: Spec, recipe: Recipe, generator: torch.Generator) -> Tensor:
    value = materialise(spec, generator)
    if spec.kind == "ids" and recipe.ids is not None:
        return place_tokens(recipe.ids(value, spec), spec)
    if spec.kind in SIGNALS and recipe.signal is not None:
        return recipe.signal(value)
    return value


def padding_mask(shape: torch.Size, side: str) -> Tensor:
    """(batch, length) of ones, with a third of the first row masked on one side, or for ``both`` of the last too."""
    mask = torch.ones(shape, dtype=torch.int64)
    count = max(shape[1] // 3, 1)
    # One row a side, so that a batch holds a padded text beside a full one.
    if side != "left":
        mask[0, -count:] = 0
    if side != "right":
        mask[-1 if side == "both" else 0, :count] = 0
    return mask


def _text_probes(model: nn.Module, guess: Guess, tokenizer: Any, seed: int, count: int) -> list[Probe]:
    """One probe for each of ``count`` sentences, cut to 32 tokens; other inputs as usual, with a batch of one."""
    probes = []
    for number, sentence in enumerate(SENTENCES[:count]):
        generator = torch.Generator().manual_seed(seed * 1000 + 500 + number)
        encoded: list[int] = []
        with suppress(InputError):  # nothing that the model needs
            encoded = token_ids(tokenizer, sentence)[:LONGEST]
        if not encoded:  # a vocabulary that knows none of its words
            continue
        made = specs(model, guess.names, replace(guess.sizes, batch=1, length=len(encoded)))
        inputs: dict[str, Any] = {}
        for name, value in made.items():
            if not isinstance(value, Spec):
                inputs[name] = value
            elif value.kind == "ids" and name in ("input_ids", "decoder_input_ids") and len(value.shape) == 2:
                inputs[name] = _with_text(value, torch.tensor(encoded))
            else:
                inputs[name] = materialise(value, generator)
        probes.append(Probe(f"text-{number}", inputs))
    return probes


def _with_text(spec: Spec, encoded: Tensor) -> Tensor:
    """(1, length): the placeholders that `spec` wants, then the sentence (cut where the ids must be shorter)."""
    extra = sum(spec.tokens.values())
    ids = torch.full(spec.shape, int(encoded[0]))
    room = spec.shape[1] - extra
    sentence = encoded[:room].clamp(max=spec.high - 1)
    if extra:
        ids = place_tokens(ids, spec)
        ids[0, 1 + extra : extra + len(sentence)] = sentence[1:]
    else:
        ids[0, : len(sentence)] = sentence
    return ids
