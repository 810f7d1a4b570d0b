"""What a dimension is in the words of a configuration: ``3*hidden_size``, ``num_heads*head_dim``, ``vocab_size+2``."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from normconvert.identification.model_types import TERM
from normconvert.identification.prints import pattern
from tools.census.zoo.snapshots import Values

WITNESSES = 2
"""So many tensors of a stack of different ones say what a value is."""


def expression_of(old: int, moved: Mapping[str, list[tuple[Any, int]]], values: Values) -> str:
    """What one dimension is, in the configuration's own words; ``_`` if it cannot be said."""
    keys = [path for path, seen in moved.items() if any(now != old for _, now in seen)]
    if not keys or any(type(values[key]) not in (int, float) for key in keys):
        return "_"
    if len(keys) == 1:
        key, value = keys[0], values[keys[0]]
        slopes = {(now - old) / (new - value) for new, now in moved[key]}
        slope = slopes.pop()
        if slopes or slope != int(slope) or slope < 1 or len(moved[key]) < 2 or type(value) is not int:
            return "_"
        factor, offset = int(slope), old - int(slope) * value
        return f"{factor}*{key}" * (factor > 1) + key * (factor == 1) + (f"{offset:+d}" if offset else "")
    whole = math.prod(float(values[key]) for key in keys)
    for key in keys:
        if any(now * values[key] != old * new for new, now in moved[key]):
            return "_"
    times = old / whole if whole else 0.0
    if len(keys) > 2 or times != int(times) or times < 1:
        return "_"
    return "*".join([*([str(int(times))] if times > 1 else []), *keys])


def evaluate(expression: str, values: Values) -> float | None:
    """The number that an expression means for a configuration; None if it says nothing there."""
    match = TERM.fullmatch(expression)
    if expression == "_" or match is None:
        return None
    factor, first, second, offset = match.groups()
    numbers = [values.get(key) for key in (first, second) if key]
    if any(type(n) not in (int, float) for n in numbers):
        return None
    return int(factor or 1) * math.prod(float(n or 0) for n in numbers) + int(offset or 0)


def drop_refuted(expressions: dict[str, list[str]], seen: Mapping[str, tuple[int, ...]], values: Values) -> None:
    """Drop what does not hold for another configuration of the type."""
    for name, row in expressions.items():
        for axis, expression in enumerate(row):
            expected = evaluate(expression, values)
            if expected is not None and name in seen and (len(seen[name]) <= axis or seen[name][axis] != expected):
                row[axis] = "_"


def collapsed(expressions: dict[str, list[str]]) -> dict[str, list[str]]:
    """One row a pattern where all its tensors say the same, else rows of tensors until each key has its witnesses."""
    witnesses: Counter[str] = Counter()
    groups: dict[str, list[str]] = defaultdict(list)
    for name in expressions:
        groups[pattern(name)].append(name)
    found: dict[str, list[str]] = {}
    for kind, members in groups.items():
        rows = {tuple(expressions[name]) for name in members}
        if len(rows) == 1:
            found[kind] = list(rows.pop())
        else:
            for name in members:
                said = set(expressions[name]) - {"_"}
                if any(witnesses[text] < WITNESSES for text in said):
                    witnesses.update(said)
                    found[name] = expressions[name]
    return found
