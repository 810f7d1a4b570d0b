"""A part as a program of torch.export with the freest shapes that it allows, and what those are.

The sizes are left to torch (``Dim.AUTO``): it fixes those that the model's code fixes, and keeps the bounds that it
meets. Where that fails, fewer axes are free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normconvert.errors import TraceError
from normconvert.exporting.failures import why
from normconvert.exporting.parts import Part
from normconvert.tracing.model_caches import fresh_caches
from normconvert.tracing.probes.facts import Facts

Range = tuple[int, int | None]
"""The least and the most; None: no limit is known."""

TEXT = ("batch", "length", "decoder_length", "past_length", "total_length")
LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions", "n_ctx")
"""What a configuration calls the longest text; believed only where a longer one fails."""
TRIED = 4096
"""Longer texts than this are not tried: they take too long."""


@dataclass(frozen=True)
class Captured:
    """A program.

    Attributes:
        program: of torch.export.
        free: input -> axis -> name, of those that may vary.
        symbols: torch's name of a size -> ours.
        ranges: name -> how small and how large it may be, as far as torch knows.
    """

    program: Any
    free: Mapping[str, Mapping[int, str]]
    symbols: Mapping[str, str]
    ranges: Mapping[str, Range]


def captures(part: Part) -> Iterator[Captured]:
    """Programs of the part, the freest first, each less free than those before.

    Raises:
        TraceError: torch.export cannot follow the model with all sizes fixed; the operation and the module are named.
    """
    failure: Exception | None = None
    made = False
    seen: list[Mapping[str, Mapping[int, str]]] = []
    for allowed in (None, TEXT, ("batch",), ()):
        wanted = {
            name: {axis: what for axis, what in axes.items() if allowed is None or what in allowed}
            for name, axes in part.axes.items()
        }
        if wanted in seen:
            continue
        seen.append(wanted)
        dynamic = tuple(
            {axis: torch.export.Dim.AUTO if axis in wanted[name] else torch.export.Dim.STATIC for axis in range(v.ndim)}
            for name, v in part.inputs.items()
        )
        try:
            with torch.no_grad(), fresh_caches(part.model):
                program = torch.export.export(
                    part.module(), tuple(part.inputs.values()), dynamic_shapes=dynamic, strict=False
                )
        except Exception as error:  # torch.export raises many kinds
            failure = error
            continue
        made = True
        yield _described(part, program)
    if not made and failure is not None:
        raise TraceError(f"torch.export cannot follow the model: {why(failure, part.model)}") from failure


def _described(part: Part, program: Any) -> Captured:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [placeholders[name].meta["val"].shape for name in program.graph_signature.user_inputs]
    free: dict[str, dict[int, str]] = {}
    symbols: dict[str, str] = {}
    for name, shape in zip(part.inputs, shapes, strict=True):
        free[name] = {}
        for axis, what in part.axes.get(name, {}).items():
            size = shape[axis]
            if not isinstance(size, torch.SymInt):
                continue
            # One that is a multiple of another, as patches make it, keeps torch's way to say so.
            symbol = str(size)
            if re.fullmatch(r"\w+", symbol):
                symbols.setdefault(symbol, what)
                free[name][axis] = what
            else:
                free[name][axis] = _renamed(symbol, dict.fromkeys(re.findall(r"[a-zA-Z_]\w*", symbol), what))
                symbols.update({s: what for s in re.findall(r"[a-zA-Z_]\w*", symbol) if s not in symbols})
    ranges: dict[str, Range] = {}
    for symbol, bounds in program.range_constraints.items():
        quantity = symbols.get(str(symbol))
        if quantity is not None:
            least = int(bounds.lower)
            most: int | None = int(bounds.upper) if bounds.upper < 2**31 else None
            before = ranges.get(quantity)
            if before is not None:
                least = max(least, before[0])
                most = min((m for m in (most, before[1]) if m is not None), default=None)
            ranges[quantity] = (least, most)
    return Captured(program, free, symbols, ranges)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[a-zA-Z_]\w*", lambda match: names.get(match[0], match[0]), text)


def renamed(text: str, captured: Captured) -> str:
    """A size as torch writes it, ``s3 + s7``, in our names."""
    return _renamed(text, captured.symbols)


def longest(part: Part, quantity: str) -> int | None:
    """The longest text that the model takes, where its configuration names a length and one more fails."""
    names = [n for n, axes in part.axes.items() if quantity in axes.values()]
    for limit in dict.fromkeys(Facts(part.model).number(name) for name in LIMITS):
        if 1 < limit <= TRIED and _runs(part, names, quantity, limit) and not _runs(part, names, quantity, limit + 1):
            return limit
    return None


def _runs(part: Part, names: list[str], quantity: str, length: int) -> bool:
    """Whether the model takes one sample of that length, made of its first example's values."""
    made = {}
    for name, value in part.inputs.items():
        for axis, what in part.axes.get(name, {}).items():
            count = 1 if what == "batch" else length if what == quantity else value.shape[axis]
            index = torch.arange(count) % value.shape[axis]
            value = value.index_select(axis, index)
        made[name] = torch.arange(length).expand(value.shape) if name.endswith("position_ids") else value
    try:
        part.run(made)
    except Exception:  # a model says in many ways that a text is too long
        return False
    return bool(names)
