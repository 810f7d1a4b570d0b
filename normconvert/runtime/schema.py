"""What a row of module edits may say: it may come from anywhere, and is checked before any of it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

MOST_EDITS = 100_000
"""Rows of a plan: more than the largest models have modules."""
_LARGEST = 1 << 40


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) < 1000 and value.isprintable())


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 1000 and all(isinstance(v, str) and _is_name(v) for v in value)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 9 and all(type(v) is int and 0 <= v <= _LARGEST for v in value)


def _is_rectangle(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_size(v) for v in value)


def _are_attributes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and k.isidentifier() and not k.startswith("_") and (_is_size(v) or _are_sizes(v))
        for k, v in value.items()
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kind", "key", "weight", "bias", "name", "activation"), _is_name),
    **dict.fromkeys(("size", "inputs", "outputs", "groups", "heads"), _is_size),
    **dict.fromkeys(
        ("optional", "mean_free", "folded", "channels_last", "expand", "guarded", "owned", "stated"), _is_flag
    ),
    **dict.fromkeys(("keep", "dropped", "attributes"), _are_names),
    **dict.fromkeys(("shape", "kernel", "stride", "padding", "dilation"), _are_sizes),
    "grid": _is_rectangle,
    "prefix": lambda value: value == 0 or _is_size(value),
    "op": lambda value: isinstance(value, str),
    "path": lambda value: isinstance(value, str) and _is_name(value),
    "side": lambda value: value in ("input", "output"),
    "basis": lambda value: value in ("paper", "isometric"),
    "axis": lambda value: type(value) is int and -9 < value < 9,
    "eps": lambda value: _is_number(value) and value >= 0,
    "offset": _is_number,
    "set": _are_attributes,
}
"""Field of a row -> whether it may have a value. A field means the same in every row."""
REQUIRED: dict[str, tuple[str, ...]] = {
    "replace": ("kind", "size", "eps"),
    "renew": ("kind", "size", "eps"),
    "center": ("side",),
    "absorb": (),
    "bias": ("size",),
    "resize": ("name", "shape"),
    "merge": ("inputs", "outputs", "groups", "kernel", "stride", "padding", "dilation"),
    "set": ("set",),
    "compress": ("side", "axis", "basis"),
    "affine": ("size", "eps"),
    "clip": ("shape",),
    "epsilon": ("attributes", "eps"),
    "attend": ("heads", "size", "grid"),
    "rename": ("name",),
}
"""Operation -> the fields that a row must have, beside ``op`` and ``path``."""


def check_module_edits(edits: Iterable[Any]) -> None:
    """Refuse rows that say what no plan says.

    Raises:
        ValueError: names the row and the field.
    """
    for number, edit in enumerate(edits):
        if number >= MOST_EDITS:
            raise ValueError(f"module edit: more than {MOST_EDITS} of them")
        if not isinstance(edit, Mapping) or not isinstance(edit.get("op"), str):
            raise ValueError(f"module edit {number}: not a row with op and path")
        op = edit["op"]
        if op not in REQUIRED:
            raise ValueError(f"module edit: unknown operation {op[:40]!r}; this file is older than the checkpoint")
        for name in ("path", *REQUIRED[op]):
            if name not in edit:
                raise ValueError(f"module edit {number} ({op}): {name} is missing")
        for name, value in edit.items():
            # What is not listed is not read either.
            if name in FIELDS and not FIELDS[name](value):
                raise ValueError(
                    f"module edit {number} ({op}): unknown {name} {str(value)[:40]!r}; this file is older than the "
                    "checkpoint, or the row is none of a plan"
                )


def check_sizes(model: nn.Module, edits: list[Mapping[str, Any]]) -> None:
    """Refuse rows that would make something far larger than the model they are for.

    Raises:
        ValueError: names the row.
    """
    modules = sum(1 for _ in model.modules())
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    widest, most = max((max(s, default=1) for s in shapes), default=1), sum(map(math.prod, shapes))
    if len(edits) > 16 * modules:
        raise ValueError(f"module edit: {len(edits)} of them for {modules} modules")
    for number, edit in enumerate(edits):
        made = 0
        if edit["op"] == "merge":  # branches of smaller kernels may make a larger one
            made = edit["outputs"] * edit["inputs"] * math.prod(edit["kernel"]) // edit["groups"] // 64
        elif edit["op"] in ("clip", "resize"):
            made = math.prod(edit["shape"])
        elif edit["op"] == "attend":  # as many positions as tokens, of which a model of few parameters may have many
            made = edit["heads"] * edit["size"] * (edit.get("prefix", 0) + math.prod(edit["grid"])) // 64
        if made > most or (edit["op"] in ("affine", "attend", "bias", "clip") and edit.get("size", 1) > widest):
            raise ValueError(f"module edit {number} ({edit['op']}): larger than the model itself")
