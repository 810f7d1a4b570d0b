"""Arguments that most calls leave out, and that have a model return more: a loss, a cache, what a flag switches on.

They are found in ``forward``'s signature. No model is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tracing.probes.choose import floating_dtype, is_timm
from normconvert.tracing.probes.facts import Facts

Shapes = Mapping[str, tuple[int, ...]]

LABELS = "labels"
ENDS = ("start_positions", "end_positions")
"""Labels of questions whose answer is a part of the text."""
CACHE = "use_cache"
NO_DOORS = ("return_dict", "output_attentions", "output_hidden_states", "training")
"""Flags that change nothing but the form; hidden states are the outputs of modules, which are marked in every call."""


def extra_arguments(model: nn.Module, inputs: Mapping[str, Any], outputs: Shapes) -> dict[str, Any]:
    """Argument -> value, to be given beside ``inputs``.

    Args:
        model: its signature is read.
        inputs: keyword arguments that its forward takes.
        outputs: name -> shape of what it returns for them; labels have the shape of the scores less the classes.
    """
    if is_timm(model):
        return {}
    facts, found = Facts(model), dict[str, Any]()
    scores = outputs.get("logits") or next(iter(outputs.values()), ())
    if LABELS in facts.parameters and len(scores) >= 2:
        # Scores of a picture have the classes in the second axis, those of a text and of a whole in the last.
        shape = (scores[0], *scores[2:]) if len(scores) > 3 else scores[:-1]
        found[LABELS] = torch.zeros(shape, dtype=torch.int64)
    if all(name in facts.parameters for name in ENDS) and scores:
        found |= {name: torch.ones(scores[:1], dtype=torch.int64) for name in ENDS}
    for name, parameter in facts.parameters.items():
        if _is_flag(parameter) and name not in NO_DOORS and (name not in inputs or name == CACHE):
            found[name] = parameter.default is not True
    return found


def _is_flag(parameter: inspect.Parameter) -> bool:
    """Whether an argument is there to be True or False: ``flag=False``, ``flag: bool | None = None``."""
    if parameter.default is None:
        kinds = str(parameter.annotation)
        return "bool" in kinds.lower() and "Tensor" not in kinds
    return isinstance(parameter.default, bool)


def encoder_outputs(model: nn.Module, inputs: Mapping[str, Any], outputs: Shapes) -> dict[str, Any] | None:
    """``inputs`` with what an encoder returns in place of what it reads; None if ``forward`` takes no such thing."""
    name, shape = "encoder_outputs", outputs.get("encoder_last_hidden_state")
    if is_timm(model) or name not in Facts(model).parameters or shape is None or name in inputs:
        return None
    main = getattr(model, "main_input_name", "input_ids")
    kept = {k: v for k, v in inputs.items() if k != main}
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {**kept, name: (values.to(floating_dtype(model)),)}


def feature_methods(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Methods ``get_*_features`` of the model, and those of ``inputs`` which they take."""
    if is_timm(model):
        return
    for name in sorted(name for name in dir(type(model)) if name.startswith("get_") and name.endswith("_features")):
        method = getattr(model, name)
        if callable(method):
            taken = inspect.signature(method).parameters
            signals = {k: v for k, v in inputs.items() if k in taken and isinstance(v, Tensor)}
            yield name, signals
