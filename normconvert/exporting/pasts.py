"""Parts that generate text one token after the other: keys and values of earlier tokens go in and come out.

Names and layout are those of optimum: ``past_key_values.0.key`` in and ``present.0.key`` out; an encoder–decoder is an
encoder, a decoder for the first token, and one that has a past, whose keys of the encoder's tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError, TraceError
from normconvert.exporting.examples import MASK, POSITIONS, Examples, padded
from normconvert.exporting.parts import PRESENT, Named, Part, floating
from normconvert.tracing.probes.facts import Facts

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (batch, heads, length, size)."""

PAST = "past_key_values"
SIDES = ("decoder", "encoder")
STEPS = ((1, 0, 1, ""), (2, 0, 6, ""), (1, 9, 1, ""), (2, 8, 4, "left"), (3, 6, 1, "left"))
"""(batch, past length, length, padded side) that a part with a past is checked on."""


def layers_of(cache: Any, source: str) -> Layers:
    """Keys and values of a cache.

    Raises:
        TraceError: it holds something else, such as the state of a recurrence.
    """
    layers = getattr(cache, "layers", None)
    found = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers or ()]
    plain = all(isinstance(k, Tensor) and isinstance(v, Tensor) and k.ndim == v.ndim == 4 for k, v in found)
    others = [name for one in layers or () for name in vars(one) if name.endswith(("states", "state"))]
    if not found or not plain or others:
        kind = type(cache).__name__ + (f" with {others[0]}" if others else "")
        raise TraceError(f"{source}: no past to export: its forward returns {kind}, not keys and values of each layer")
    return [(k, v) for k, v in found if isinstance(k, Tensor) and isinstance(v, Tensor)]


def with_past(model: nn.Module, found: Examples, source: str) -> Part:
    """A decoder that takes the past of its tokens, which may be empty, and returns it with theirs.

    Raises:
        InputError: the model reads something else than token ids.
        TraceError: it has no keys and values.
    """
    facts = Facts(model)
    if "input_ids" not in found.inputs or any(v.is_floating_point() for v in found.inputs.values()):
        raise InputError(f"{source}: --with-past is for models that read token ids alone")
    if "decoder_input_ids" in facts.parameters:
        raise InputError(f"{source}: an encoder–decoder's past needs its own files: give a folder for FILE")
    if "use_cache" not in facts.parameters and PAST not in facts.parameters:
        raise InputError(f"{source}: --with-past is for models that keep keys and values; this one keeps none")
    fixed = {**found.fixed, "use_cache": True}
    positions = POSITIONS in facts.parameters

    def call(inputs: dict[str, Tensor]) -> Named:
        cache = cache_of(_taken(inputs, PAST))
        output = model(**inputs, **fixed, past_key_values=cache)
        return [*floating(dict(output)), *_presents(layers_of(output.past_key_values, source), PRESENT)]

    def example(batch: int, past: int, length: int, side: str) -> dict[str, Tensor]:
        ids = _text(found.inputs["input_ids"], batch, past + length)
        mask = padded({MASK: torch.ones_like(ids)}, side)[MASK]
        place = (mask.cumsum(-1) - 1).clamp_min(0)
        before = {"input_ids": ids[:, :past], MASK: mask[:, :past]} | (
            {POSITIONS: place[:, :past]} if positions else {}
        )
        with torch.no_grad():
            layers = layers_of(model(**(before if past else {"input_ids": ids}), **fixed).past_key_values, source)
        layers = [(k[:, :, :past], v[:, :, :past]) for k, v in layers]
        here = {"input_ids": ids[:, past:], MASK: mask} | ({POSITIONS: place[:, past:]} if positions else {})
        return {k: v.contiguous() for k, v in {**here, **dict(_presents(layers, PAST))}.items()}

    inputs = example(3, 5, 7, "")
    axes = {"input_ids": {0: "batch", 1: "length"}, MASK: {0: "batch", 1: "total_length"},
            POSITIONS: {0: "batch", 1: "length"}}  # fmt: skip
    axes = {name: axes.get(name, {0: "batch", 2: "past_length"}) for name in inputs}
    return Part("model", model, call, inputs, axes, [example(*step) for step in STEPS])


def cache_of(layers: Layers) -> Any:
    """A cache that holds these."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _presents(layers: Layers, prefix: str, side: str = "") -> Named:
    return [
        (f"{prefix}.{number}{side}.{kind}", value)
        for number, pair in enumerate(layers)
        for kind, value in zip(("key", "value"), pair, strict=True)
    ]


def _taken(inputs: dict[str, Tensor], prefix: str, side: str = "") -> Layers:
    """The layers among the inputs, which then no longer hold them."""
    found: Layers = []
    while f"{prefix}.{len(found)}{side}.key" in inputs:
        number = len(found)
        found.append((inputs.pop(f"{prefix}.{number}{side}.key"), inputs.pop(f"{prefix}.{number}{side}.value")))
    return found


def _text(ids: Tensor, batch: int, length: int) -> Tensor:
    """Some text of the ids of an example."""
    flat = ids.flatten()
    return flat[torch.arange(batch * length) * 5 % len(flat)].view(batch, length)


def encoder_decoder(model: nn.Module, found: Examples, source: str) -> Iterator[Part]:
    """The encoder, the decoder for the first tokens, and the decoder that has a past.

    Raises:
        InputError: the model is no encoder–decoder, or has no encoder that can be called by itself.
        TraceError: its decoder has no keys and values.
    """
    whole_inputs = found.inputs
    if "decoder_input_ids" not in whole_inputs or not hasattr(model, "get_encoder"):
        raise InputError(f"{source}: a folder is for encoder–decoders; name a file, model.onnx")
    encoder = model.get_encoder()  # type: ignore[operator]
    names = [name for name in whole_inputs if not name.startswith("decoder_")]

    def encode(inputs: dict[str, Tensor]) -> Named:
        return [("last_hidden_state", encoder(**inputs).last_hidden_state)]

    def of_encoder(inputs: Any) -> dict[str, Tensor]:
        return {name: inputs[name] for name in names}

    yield Part(
        "encoder_model", encoder, encode, of_encoder(whole_inputs),
        {name: found.axes[name] for name in names}, [of_encoder(check) for check in found.checks],
    )  # fmt: skip
    yield from _decoders(model, found, encoder, names, source)


def _decoders(model: nn.Module, found: Examples, encoder: nn.Module, names: list[str], source: str) -> Iterator[Part]:
    from transformers import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    masked, fixed = MASK in names, {**found.fixed, "use_cache": True}
    with torch.no_grad():
        width = encoder(**{name: found.inputs[name] for name in names}).last_hidden_state.shape[-1]

    def decode(ids: Tensor, states: Tensor, mask: dict[str, Tensor], cache: Any) -> Any:
        outputs = BaseModelOutput(last_hidden_state=states)
        return model(decoder_input_ids=ids, encoder_outputs=outputs, **mask, **fixed, past_key_values=cache)

    def first(inputs: dict[str, Tensor]) -> Named:
        mask = {MASK: inputs["encoder_attention_mask"]} if masked else {}
        output = decode(inputs["input_ids"], inputs["encoder_hidden_states"], mask, None)
        cache = output.past_key_values
        own, cross = layers_of(cache.self_attention_cache, source), layers_of(cache.cross_attention_cache, source)
        return [
            ("logits", output.logits),
            *_presents(own, PRESENT, ".decoder"), *_presents(cross, PRESENT, ".encoder"),
        ]  # fmt: skip

    def later(inputs: dict[str, Tensor]) -> Named:
        own, cross = (_taken(inputs, PAST, f".{side}") for side in SIDES)
        mask = {MASK: inputs["encoder_attention_mask"]} if masked else {}
        # Nobody reads them, for their keys are known; that they are there says that there was an encoder.
        states = cross[0][0].new_zeros(cross[0][0].shape[0], cross[0][0].shape[2], width)
        output = decode(inputs["input_ids"], states, mask, EncoderDecoderCache(cache_of(own), cache_of(cross)))
        layers = layers_of(output.past_key_values.self_attention_cache, source)
        return [("logits", output.logits), *_presents(layers, PRESENT, ".decoder")]

    def first_example(call: Any, length: int) -> dict[str, Tensor]:
        with torch.no_grad():
            states = encoder(**{name: call[name] for name in names}).last_hidden_state
        ids = _text(call["decoder_input_ids"], len(states), length)
        return {"input_ids": ids, "encoder_hidden_states": states} | (
            {"encoder_attention_mask": call[MASK]} if masked else {}
        )

    def later_example(call: Any, past: int, length: int) -> dict[str, Tensor]:
        made = first_example(call, past + length)
        with torch.no_grad():
            before = dict(first({**made, "input_ids": made["input_ids"][:, :past]}))
        kept = {k: v for k, v in made.items() if k != "encoder_hidden_states"} | {
            "input_ids": made["input_ids"][:, past:]
        }
        states = {k.replace(PRESENT, PAST, 1): v for k, v in before.items() if k.startswith(PRESENT)}
        return {k: v.contiguous() for k, v in {**kept, **states}.items()}

    text = {0: "batch", 1: "encoder_length"}
    one = {"input_ids": {0: "batch", 1: "length"}, "encoder_hidden_states": text, "encoder_attention_mask": text}
    checks = list(found.checks)
    inputs = first_example(found.inputs, 6)
    yield Part("decoder_model", model, first, inputs, {k: one[k] for k in inputs},
               [first_example(check, 1 + 3 * (number % 3)) for number, check in enumerate(checks)])  # fmt: skip
    inputs = later_example(found.inputs, 5, 3)
    axes = {k: one.get(k, {0: "batch", 2: "encoder_length" if ".encoder." in k else "past_length"}) for k in inputs}
    steps = [later_example(check, 1 + 4 * (number % 2), 1 + number % 3) for number, check in enumerate(checks)]
    yield Part("decoder_with_past_model", model, later, inputs, axes, steps)


def against_whole(model: nn.Module, part: Part) -> float:
    """How far tokens with a past are from the same tokens read at once, in torch: the largest relative error."""
    ids = part.inputs["input_ids"]
    length, past = ids.shape[1], next(v.shape[2] for k, v in part.inputs.items() if k.startswith(PAST))
    total = _text(ids, ids.shape[0], past + length)
    empty = {k: v[:, :, :0] for k, v in part.inputs.items() if k.startswith(PAST)}
    positions = torch.arange(past + length).expand_as(total)

    def step(start: int, stop: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {"input_ids": total[:, start:stop], MASK: torch.ones_like(total[:, :stop]), **before}
        made |= {POSITIONS: positions[:, start:stop]} if POSITIONS in part.inputs else {}
        return dict(zip(part.outputs, part.run({k: made[k] for k in part.inputs}), strict=True))

    first = step(0, past, empty)
    second = step(past, past + length, {k: first[k.replace(PAST, PRESENT, 1)] for k in empty})
    with torch.no_grad():
        expected = model(input_ids=total, use_cache=False)[0][:, past:]
    found = next(iter(second.values()))
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
