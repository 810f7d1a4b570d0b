"""Which arguments to give a model, and with what sizes: the likely guess first, then others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.tracing.known_values import LARGEST, UNKNOWN_VALUE
from normconvert.tracing.probes.asking import call_fake, feature_count, needed, quiet
from normconvert.tracing.probes.builders import BUILDERS, PLACEHOLDERS, TOKEN_TYPES
from normconvert.tracing.probes.facts import Facts, Sizes
from normconvert.tracing.probes.specs import SIGNALS, Spec, materialise

SIGNAL_ARGUMENTS = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "image",
    "audio_values",
    "image_pixel_values",
)

COMPANIONS: dict[str, tuple[str, ...]] = {
    "pixel_values": (
        *("image_grid_thw", "grid_thw", "merge_sizes", "aspect_ratio_ids", "aspect_ratio_mask", "spatial_shapes"),
        *("image_embeds_position_mask", "mm_token_type_ids", "target_sizes"),
    ),
    "pixel_values_videos": ("video_grid_thw", "mm_token_type_ids"),
    "input_features": ("feature_attention_mask",),
    "hidden_states": ("grid_thw",),
    "past_values": ("past_time_features", "future_time_features", "static_categorical_features"),
    "states": ("actions", "rewards", "returns_to_go", "timesteps"),
    "visual_feats": ("visual_pos",),
}
"""Argument -> arguments without which it makes no sense, where forward takes them."""

SIZES: tuple[Sizes, ...] = (
    Sizes(),
    Sizes(batch=1),
    Sizes(length=16, image=224, samples=15360, frames=200),
    Sizes(layout=1),
    Sizes(layout=2),
    Sizes(layout=3),
    Sizes(length=64, image=256, samples=15360, frames=1024),
    Sizes(image=336),
    Sizes(length=128, image=336, samples=48000, frames=3000),
    Sizes(image=384),
    Sizes(image=448),
    Sizes(batch=1, length=64, image=512, samples=80640, frames=1024),
)

MOST = 1 << 25
"""Numbers in one input: a configuration that asks for more has another size tried, where the model takes one."""
LONG = 16
"""Sizes with longer texts than this come after every layout."""


@dataclass(frozen=True)
class Guess:
    """One way to call the model: argument -> Spec or plain value, and what it was made from."""

    specs: dict[str, Any]
    names: list[str]
    sizes: Sizes


def is_timm(model: nn.Module) -> bool:
    """Whether the model is timm's (they all carry the configuration of their weights)."""
    return (hasattr(model, "pretrained_cfg") or hasattr(model, "default_cfg")) and not hasattr(model, "main_input_name")


def _timm_specs(model: nn.Module, sizes: Sizes) -> dict[str, Any]:
    """timm's ``forward(x)``: an image of the size that the patch embedding fixes, else of the pretrained size."""
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, *side = settings.get("input_size") or (3, 224, 224)
    for module in model.modules():
        if (fixed := getattr(module, "img_size", None)) is not None:
            side = [fixed, fixed] if isinstance(fixed, int) else list(fixed)
            break
    else:
        if sizes.image is None and not settings.get("fixed_input_size") and min(side) > 224:
            side = [224, 224]
    if sizes.image:
        side = [sizes.image, sizes.image]
    channels = getattr(model, "in_chans", None) or channels
    return {"x": Spec((sizes.batch, int(channels), *(int(s) for s in side)), "image")}


EXTRAS = (
    ["image_sizes"],
    ["input_features_mask"],
    ["image_attention_mask"],
    ["bbox"],
    ["attention_mask"],
    ["encoder_hidden_states"],
    ["future_values"],
    ["bbox", "image"],
    ["pixel_mask"],
    ["visual_feats", "visual_pos"],
)
"""Optional arguments that some models cannot do without; each is tried with the fullest set."""
LONE = ("x", "inputs", "inputs_embeds", "past_values", "states")
"""What a model without named main inputs may read, the likeliest first; then its arguments in their order."""


def argument_sets(facts: Facts) -> Iterator[list[str]]:
    """Sets of argument names, the fullest first.

    Raises:
        TraceError: no example is known for a required argument, or for any argument.
    """
    _refuse_unknown(facts)
    full = _fullest(facts)
    seen: set[tuple[str, ...]] = set()
    for option in [full, *_variants(facts, full)]:
        option = list(dict.fromkeys(option))
        if option and set(facts.required) <= set(option) and tuple(option) not in seen:
            seen.add(tuple(option))
            yield option


def _refuse_unknown(facts: Facts) -> None:
    unknown = [name for name in facts.required if name not in BUILDERS]
    if unknown:
        raise TraceError(
            f"cannot trace {type(facts.model).__name__}: no example is known for its required argument {unknown[0]!r}"
        )


def _signals(facts: Facts) -> list[str]:
    return [name for name in SIGNAL_ARGUMENTS if name in facts.parameters]


def _fullest(facts: Facts) -> list[str]:
    """All that a usual call gives: what is required, the main inputs, a text, a signal, and what goes with them."""
    names, signals = facts.parameters, _signals(facts)
    full = list(dict.fromkeys([*facts.required, *facts.main]))
    if "input_ids" in names and "inputs" not in full:
        full.append("input_ids")
    if signals and not any(name in full for name in signals):
        full.append(signals[0])
    if "decoder_input_ids" in names and not facts.classifies_texts:
        full.append("decoder_input_ids")
    full += companions(facts, full)
    if not full:
        full = [name for name in (*LONE, *names) if name in names and name in BUILDERS][:1]
        full += companions(facts, full)
    if not full:
        raise TraceError(f"cannot trace {type(facts.model).__name__}: no example is known for any of its arguments")
    return full


def companions(facts: Facts, chosen: list[str]) -> list[str]:
    """Arguments that go with the chosen ones: by the table, and by what the model's own methods of features demand."""
    known = [extra for name in chosen for extra in COMPANIONS.get(name, ()) if extra in facts.parameters]
    return [*known, *(extra for name in chosen for extra in needed(facts, name) if extra in BUILDERS)]


def _variants(facts: Facts, full: list[str]) -> Iterator[list[str]]:
    """Less than the fullest set, then more, then something else."""
    names, signals = facts.parameters, _signals(facts)
    text = "input_ids" in names
    if text and signals:
        gone = {*signals, *companions(facts, signals)}
        yield [name for name in full if name not in gone]
        yield [name for name in full if name not in ("input_ids", "decoder_input_ids")]
        yield [name for name in full if name != "input_ids"]
    if len(signals) > 1:  # images and sounds at once
        yield [*full, *signals, *companions(facts, signals)]
    for extra in EXTRAS:
        if all(name in names and name not in full for name in extra):
            yield [*full, *extra]
    if "inputs_embeds" in names and not text:
        yield ["inputs_embeds"]


def specs_for(facts: Facts, names: list[str], sizes: Sizes) -> dict[str, Any]:
    """One guess: argument -> Spec or plain value, placeholders for signals set among the token ids."""
    specs = {name: BUILDERS[name](facts, sizes) for name in names}
    specs = {name: spec for name, spec in specs.items() if spec is not None}
    if isinstance(text := specs.get("input_ids"), Spec):
        specs["input_ids"] = longer = _with_placeholders(facts, specs)
        if isinstance(mask := specs.get("attention_mask"), Spec) and mask.shape == text.shape:
            specs["attention_mask"] = replace(mask, shape=longer.shape)
        if "mm_token_type_ids" in specs:
            specs["mm_token_type_ids"] = _token_types(facts, specs["input_ids"])
    return specs


def _token_types(facts: Facts, text: Spec) -> Spec:
    """Which signal each token of the text stands for, 0 for none."""
    kinds = {facts.number(*names, default=-1): TOKEN_TYPES[signal] for signal, names in PLACEHOLDERS.items()}
    row = [0]
    for token, count in text.tokens.items():
        row += [kinds.get(token, 0)] * count
    row = (row + [0] * text.shape[-1])[: text.shape[-1]]
    return Spec(text.shape, "given", value=[row] * text.shape[0])


def _with_placeholders(facts: Facts, specs: dict[str, Any]) -> Spec:
    """The text's Spec with as many placeholder tokens a row as the signals have features."""
    text: Spec = specs["input_ids"]
    tokens: dict[int, int] = {}
    for signal, attributes in PLACEHOLDERS.items():
        token = facts.number(*attributes, default=-1)
        if token < 0:
            continue
        count = 0
        if signal in specs:
            count = feature_count(facts, signal, to_trace(facts.model, specs)) // text.shape[0]
        # Also a count of 0: random ids must not hold a placeholder that nothing fills.
        tokens[token] = max(count, tokens.get(token, 0))
    end = facts.number("eos_token_id", part="text", default=-1)
    if facts.classifies_texts and 0 <= end < facts.vocabulary:
        tokens.setdefault(end, 1)  # whose output is read: tokenizers write one at the end of each text
    extra = sum(tokens.values())
    if "image_embeds_position_mask" in specs:
        return replace(text, shape=specs["image_embeds_position_mask"].shape)
    high = max([text.high, *(token + 1 for token, count in tokens.items() if count)])
    return replace(text, shape=(*text.shape[:-1], text.shape[-1] + extra), tokens=tokens, high=high) if tokens else text


def switches(facts: Facts) -> dict[str, Any]:
    """Arguments that keep caches out of the outputs. A config is told as well, for models that look only there."""
    for config in facts.configs():
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return {name: False for name in ("use_cache", "use_mems") if name in facts.parameters}


def specs(model: nn.Module, names: list[str], sizes: Sizes, facts: Facts | None = None) -> dict[str, Any]:
    """Argument -> Spec or plain value, for the named arguments and sizes."""
    if is_timm(model):
        return _timm_specs(model, sizes)
    facts = facts or Facts(model)
    return {**specs_for(facts, names, sizes), **switches(facts)}


def guesses(model: nn.Module, done: Collection[tuple[str, ...]] = ()) -> Iterator[Guess]:
    """All guesses, the likely first, no two alike.

    Args:
        model: see :func:`ranked`.
        done: arguments of which no further sizes are asked for; the caller may add to it meanwhile.

    Raises:
        TraceError: all have inputs that are out of all proportion.
    """
    seen: set[str] = set()
    most, facts = 0, Facts(model)
    for names in [["x"]] if is_timm(model) else argument_sets(facts):
        for sizes in SIZES:
            if tuple(names) in done:
                break
            guess = specs(model, names, sizes, facts)
            size = max((math.prod(spec.shape) for spec in guess.values() if isinstance(spec, Spec)), default=0)
            if size > MOST:
                most = max(most, size)
                continue
            # Compared as text, as the values in a Spec cannot be hashed.
            if repr(guess) not in seen:
                seen.add(repr(guess))
                yield Guess(guess, names, sizes)
    if most and not seen:
        raise TraceError(
            f"cannot trace {type(model).__name__}: its configuration asks for an input of {most} numbers, "
            f"more than {MOST}"
        )


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating parameter (float32 if it has none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def to_trace(model: nn.Module, specs: dict[str, Any]) -> dict[str, Any]:
    """Specs as tensors to trace with, always the same, signals in the model's dtype; other values as they are.

    They have values, on the CPU; signals too large for anybody to look at each number are on the meta device.
    """
    dtype = floating_dtype(model)
    return {name: _tensor(value, dtype) if isinstance(value, Spec) else value for name, value in specs.items()}


def _tensor(spec: Spec, dtype: torch.dtype) -> Tensor:
    if spec.kind in SIGNALS and math.prod(spec.shape) > LARGEST:
        return torch.empty(spec.shape, dtype=dtype, device="meta")
    # One seed: the graph may depend on these values, and has to be the same in every run.
    value = materialise(spec, torch.Generator().manual_seed(0))
    return value.to(dtype) if value.is_floating_point() else value


def accepts(model: nn.Module, inputs: dict[str, Any]) -> str:
    """``yes`` if forward runs on inputs of these shapes, ``maybe`` if only an unknown value stops it, else why not.

    It runs in the fake mode that `torch.export` uses, since models ask whether they are traced. Nothing is computed.
    """
    try:
        call_fake(model, model, inputs)
    except UNKNOWN_VALUE:
        return "maybe"
    except Exception as error:  # whatever a wrong guess makes a model raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "yes"


def answered(model: nn.Module, done: set[tuple[str, ...]]) -> Iterator[tuple[Guess, str]]:
    """All guesses with what :func:`accepts` says of them; ``done``: see :func:`guesses`.

    Raises:
        TraceError: no guess can be made at all.
    """
    answers: dict[tuple[str, ...], str] = {}
    for guess in guesses(model, done):
        with quiet():
            answer = accepts(model, to_trace(model, guess.specs))
        before = answers.setdefault(tuple(guess.names), answer)
        if answer == before and answer not in ("yes", "maybe") and guess.sizes.length > LONG:
            done.add(tuple(guess.names))  # the very same error at other sizes and layouts: neither is the trouble
        yield guess, answer


def ranked(model: nn.Module, most: int = 6) -> Iterator[tuple[Guess, str]]:
    """Guesses that forward takes (``yes``), then those that only an unknown value stops (``maybe``), else the first.

    Args:
        model: on the meta device or any other; nothing is computed.
        most: how many to give.

    Raises:
        TraceError: no guess can be made at all.
    """
    first: tuple[Guess, str] | None = None
    maybe: list[tuple[Guess, str]] = []
    given = 0
    for guess, answer in answered(model, set()):
        first = first or (guess, answer)
        if answer == "yes":
            yield guess, answer
            given += 1
            if given == most:
                return
        elif answer == "maybe":
            maybe.append((guess, answer))
    if first is None:
        raise TraceError(
            f"cannot trace {type(model).__name__}: its forward takes no argument that an example is known for"
        )
    maybe = maybe[: most - given]
    yield from maybe
    if not given and not maybe:
        yield first
