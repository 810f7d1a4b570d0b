"""Sizes that a configuration states, held against the tensors that the weights hold, before anything is made of them.

A config.json of a hundred bytes may ask for a thousand million layers or labels; the headers of the weights tell how
many there can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from normconvert.errors import InputError
from normconvert.files.tensor_info import TensorInfo

COUNTS = re.compile(r"(^|_)(n|num|number)_|(layer|depth|block|label|expert|stage|head|repeat|class|group)s?(_|$)")
"""Names of what a library makes one by one."""
NO_COUNTS = re.compile(r"eps(ilon)?$|(^|_)(theta|base|scale|factor|decay|std|value)(_|$)")
"""Names of numbers that may be large: an unfused norm has an epsilon of 1e12."""
LAYERS = re.compile(r"(^|_)(layer|depth|block|stage|repeat)s?$")
"""Names of what has tensors of its own, each time."""
FRAMES = re.compile(r"(^|_)frames?(_|$)")
"""Names of what has a position each, which some models make in Python, one by one."""
FEW_FRAMES = 10_000
FEW_LAYERS = 200
"""What may be shared by all of them."""
HARMLESS = 1_000_000
"""So many of anything are made in a second or so; more than the weights' widest dimension are not meant."""
MORE_PARAMETERS, MORE_ELEMENTS = 256, 4
"""Times what the weights hold that a model may have before it is given up: a library may split what they keep together,
as the experts of a layer, and what is tied counts twice."""
FEW_PARAMETERS, FEW_ELEMENTS = 4096, 100_000_000
FEW_CONSTANTS = 200_000_000
"""Elements of buffers, which no file has to hold: tables of positions, masks of them."""


def check_stated_sizes(where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse counts that are out of all proportion to the weights.

    Args:
        where: the checkpoint, for the message.
        config: config.json.
        tensors: of the weights.

    Raises:
        InputError: names the entry.
    """
    widest = max((max(info.shape, default=1) for info in tensors.values()), default=1)
    most, layers, frames = max(HARMLESS, widest, len(tensors)), max(FEW_LAYERS, len(tensors)), max(FEW_FRAMES, widest)
    for key, value in _numbers(config, "", 0):
        if value > (layers if LAYERS.search(key) else frames if FRAMES.search(key) else most):
            raise InputError(
                f"{where}: config.json says {key}: {value}, and the weights hold {len(tensors)} tensors, none wider "
                f"than {widest}"
            )


def _numbers(data: Any, key: str, depth: int, counts: bool = False) -> Iterator[tuple[str, int]]:
    """(key, number) for all whole numbers that may be counts, at any depth."""
    if depth > 100:
        raise InputError(f"config.json: nested too deeply at {key[:40]}")
    if isinstance(data, Mapping):
        for name, value in data.items():
            # Arguments of a timm model are nothing but sizes.
            inside = counts or str(name) == "model_args" or COUNTS.search(str(name)) is not None
            yield from _numbers(value, str(name), depth + 1, inside)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _numbers(value, key, depth + 1, counts)
    elif counts and isinstance(data, (int, float)) and math.isfinite(data) and not NO_COUNTS.search(key):
        yield key, int(abs(data))


@contextmanager
def in_proportion(where: str, tensors: Mapping[str, TensorInfo]) -> Iterator[None]:
    """Stop the making of a model, on whatever device, that has far more in it than the weights could fill.

    Raises:
        InputError: it has.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_parameter_registration_hook,
    )

    held = sum(math.prod(info.shape) for info in tensors.values())
    parameters, elements = MORE_PARAMETERS * len(tensors) + FEW_PARAMETERS, MORE_ELEMENTS * held + FEW_ELEMENTS
    made = [0, 0]

    def count(module: Any, name: str, parameter: Any) -> None:
        made[0] += 1
        made[1] += 0 if parameter is None else parameter.numel()
        if made[0] > parameters or made[1] > elements:
            raise InputError(
                f"{where}: config.json states a model of more than {min(made[0], parameters)} parameters with "
                f"{min(made[1], elements)} elements; the weights hold {len(tensors)} with {held}"
            )

    constants = [0]

    def count_constants(module: Any, name: str, buffer: Any) -> None:
        constants[0] += 0 if buffer is None else buffer.numel()
        if constants[0] > MORE_ELEMENTS * held + FEW_CONSTANTS:
            raise InputError(
                f"{where}: config.json states a model with {constants[0]} numbers in tables and masks ({name}); the "
                f"weights hold {held}"
            )

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count_constants),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
