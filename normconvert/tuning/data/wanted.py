"""What a model takes: the names, shapes and kinds of its inputs, as far as data has to fit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.sources import Source
from normconvert.tracing.probes import trace_inputs
from normconvert.tracing.probes.facts import Facts

TEXT = "input_ids"


@dataclass(frozen=True)
class Wanted:
    """See the module's text.

    Attributes:
        source: the model's checkpoint: where its tokenizer and its image processor are.
        names: all arguments of the model.
        main: the one that carries the data, ``input_ids`` for text.
        shape: (channels, height, width) of an image; None for text and others.
        vocabulary: how many token ids there are.
        positions: the longest text; None: not known.
        causal: each position predicts the next.
        classes: how many an image may have; None: not known.
    """

    source: Source
    names: tuple[str, ...]
    main: str
    shape: tuple[int, ...] | None
    vocabulary: int
    positions: int | None
    causal: bool
    classes: int | None


def wanted_by(source: Source, model: nn.Module) -> Wanted:
    """What ``model`` (on the meta device) takes."""
    inputs = trace_inputs(model)
    facts = Facts(model)
    images = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim == 4]
    main = TEXT if TEXT in inputs else images[0] if images else next(iter(inputs))
    shape = tuple(inputs[main].shape[1:]) if main in images else None
    positions = facts.number("n_positions", "max_position_embeddings", "max_seq_len", default=0)
    config: Any = getattr(model, "config", None)
    architectures = source.architecture.lower()
    causal = main == TEXT and config is not None and ("causallm" in architectures or "lmhead" in architectures)
    return Wanted(
        source=source,
        names=tuple(facts.parameters),
        main=main,
        shape=shape,
        vocabulary=facts.vocabulary,
        positions=positions or None,
        causal=causal,
        classes=getattr(model, "num_classes", None) or facts.number("num_labels", "num_classes") or None,
    )


def check_columns(name: str, columns: dict[str, Tensor], wanted: Wanted) -> None:
    """Refuse inputs that the model cannot take, before training.

    Raises:
        InputError: an unknown or missing argument, another dtype or size, or an id beyond the vocabulary.
    """
    inputs = {k: v for k, v in columns.items() if k != "labels"}
    unknown = [k for k in inputs if k not in wanted.names]
    if unknown or wanted.main not in inputs:
        raise InputError(
            f"{name}: expected the model's arguments {', '.join(wanted.names[:6])}, {wanted.main} among them; "
            f"found {', '.join(columns) or 'nothing'}"
        )
    sizes = {k: len(v) for k, v in columns.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{k} {n}" for k, n in sizes.items())
        raise InputError(f"{name}: the columns have different numbers of examples: {listed}")
    if not next(iter(sizes.values())):
        raise InputError(f"{name}: no examples")
    main = inputs[wanted.main]
    if wanted.main == TEXT:
        if main.is_floating_point():
            raise InputError(f"{name}: {wanted.main} is {_kind(main)}; expected integers, token ids")
        high, low = int(main.max()), int(main.min())
        if low < 0 or high >= wanted.vocabulary:
            found = low if low < 0 else high
            raise InputError(f"{name}: token id {found} is outside the model's vocabulary of {wanted.vocabulary}")
        if main.ndim != 2:
            raise InputError(f"{name}: {wanted.main} has shape {list(main.shape)}; expected (examples, positions)")
        if wanted.positions is not None and main.shape[1] > wanted.positions:
            raise InputError(f"{name}: texts of {main.shape[1]} tokens; the model takes at most {wanted.positions}")
    elif wanted.shape is not None:
        if not main.is_floating_point():
            raise InputError(f"{name}: {wanted.main} is {_kind(main)}; expected floating pixels, ready for the model")
        if tuple(main.shape[1:]) != wanted.shape:
            raise InputError(f"{name}: images of shape {list(main.shape[1:])}; the model takes {list(wanted.shape)}")


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
