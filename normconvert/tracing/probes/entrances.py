"""Other ways into a model than its usual input: embeddings in place of what they are made of.

They are found in ``forward``'s signature: an argument whose name ends in ``inputs_embeds`` stands for the token ids of
the same prefix, any other ``..._embeds`` for the signal beside it. No model is named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tracing.probes.builders import patch_count
from normconvert.tracing.probes.choose import SIGNAL_ARGUMENTS, accepts, companions, floating_dtype, is_timm
from normconvert.tracing.probes.facts import Facts

IDS = "inputs_embeds"
WIDTHS = ("hidden_size", "d_model", "n_embd", "embedding_size", "visual_embedding_dim", "projection_dim")


@dataclass(frozen=True)
class Entrance:
    """One call of the model with embeddings from outside.

    Attributes:
        names: the arguments that hold them.
        inputs: all keyword arguments; embeddings are floating tensors (batch, tokens, width) in the model's dtype.
    """

    names: tuple[str, ...]
    inputs: dict[str, Any]


def entrance_names(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """The arguments of ``forward`` that take embeddings and are not among ``inputs``, by their names."""
    if is_timm(model):
        return []
    return [name for name in Facts(model).parameters if name.endswith("_embeds") and name not in inputs]


def entrances(model: nn.Module, inputs: Mapping[str, Any], *, seed: int = 0) -> Iterator[list[Entrance]]:
    """Calls with embeddings in place of other inputs, each as alternatives to try in turn.

    Token embeddings of all sides come in one call, which costs one trace; where no alternative of a list is accepted,
    the lists that follow have the same arguments one by one.

    Args:
        model: on any device; its signature, config and shapes are read.
        inputs: keyword arguments that its forward takes.
        seed: of the values.
    """
    names = entrance_names(model, inputs)
    texts = [name for name in names if name.endswith(IDS)]
    if texts:
        yield _text(model, inputs, texts, seed)
    if len(texts) > 1:
        for name in texts:
            yield _text(model, inputs, [name], seed)
    for name in names:
        if name not in texts:
            yield _signal(model, inputs, name, seed)


def _text(model: nn.Module, inputs: Mapping[str, Any], names: list[str], seed: int) -> list[Entrance]:
    """Token ids replaced; where a signal is beside them, without it first: placeholders are told by their ids."""
    found: list[Entrance] = []
    for bare in (True, False):
        kept = _without_signals(model, inputs, names) if bare else dict(inputs)
        for widths in _widths(model, names):
            call, complete = dict(kept), True
            for number, (name, width) in enumerate(zip(names, widths, strict=True)):
                ids = call.pop(name.removesuffix(IDS) + "input_ids", None)
                shape = ids.shape[:2] if isinstance(ids, Tensor) and ids.ndim >= 2 else None
                complete = complete and shape is not None
                call[name] = _values((*(shape or (2, 7)), width), model, seed + number)
            if complete and not any(call.keys() == other.inputs.keys() and widths == _last(other) for other in found):
                found.append(Entrance(tuple(names), call))
    return found


def _last(entrance: Entrance) -> tuple[int, ...]:
    return tuple(int(entrance.inputs[name].shape[-1]) for name in entrance.names)


def _without_signals(model: nn.Module, inputs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inputs without images and sounds beside the ids of the same side."""
    if IDS not in names or "input_ids" not in inputs:
        return dict(inputs)
    signals = [name for name in SIGNAL_ARGUMENTS if name in inputs]
    gone = {*signals, *companions(Facts(model), signals)}
    return {name: value for name, value in inputs.items() if name not in gone}


def _widths(model: nn.Module, names: list[str]) -> list[tuple[int, ...]]:
    """For each name the width of the table that it stands for; then what the config says."""
    own = []
    for name in names:
        part: Any = model
        if name != IDS:
            with contextlib.suppress(Exception):  # a model that has no such part says so in many ways
                part = model.get_decoder()  # type: ignore[operator]
        width = _table_width(part) or _table_width(model)
        own.append(width or Facts(model).number(*WIDTHS, part="text"))
    configured = tuple(
        Facts(model).number(*WIDTHS, part="decoder" if name != IDS else "text", default=own[i])
        for i, name in enumerate(names)
    )
    return [widths for widths in dict.fromkeys([tuple(own), configured]) if all(widths)]


def _table_width(model: Any) -> int:
    try:
        table = model.get_input_embeddings()
    except Exception:  # as above
        return 0
    weight = getattr(table, "weight", None)
    return int(weight.shape[-1]) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def _signal(model: nn.Module, inputs: Mapping[str, Any], name: str, seed: int) -> list[Entrance]:
    """Features of a signal in its place, or beside the text; the first that a try on fake tensors accepts."""
    facts = Facts(model)
    batch = next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 2)
    widths = [facts.number(*WIDTHS, part=part) for part in ("vision", "audio", "text")]
    widths += [facts.number(one) for one in WIDTHS]
    signals = {s for s in SIGNAL_ARGUMENTS if s in inputs}
    without = {k: v for k, v in inputs.items() if k not in signals}
    for kept in (without, dict(inputs)) if signals else (without,):
        for width in dict.fromkeys(w for w in widths if w):
            for count in dict.fromkeys((patch_count(facts), 7)):
                call = {**kept, name: _values((batch, count, width), model, seed)}
                if accepts(model, call) in ("yes", "maybe"):
                    return [Entrance((name,), call)]
    return []


def _values(shape: tuple[int, ...], model: nn.Module, seed: int) -> Tensor:
    """Normal values, the same each time, in the model's dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(floating_dtype(model))
