"""The model types of transformers by the names of their tensors, and the configuration that shapes fix.

A checkpoint of transformers without config.json says what it is by its names: ``model.layers.3.mlp.up_proj.weight``.
The index, ``data/transformers.xz``, holds for each model class the patterns of names (``#`` for a number) that its
checkpoints have or may have, and what the dimensions are in the configuration's own words.

Unlike timm's names these stand for no finished architecture: numbers of heads, activation functions or the base of
rotary embeddings change no shape. So what is found here is never taken for granted, but tells what a config.json has to
say.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from normconvert.identification.prints import pattern
from normconvert.identification.result import Candidate, Near, Shape

INDEX = Path(__file__).parent / "data" / "transformers.xz"
TERM = re.compile(r"(?:(\d+)\*)?([^*+]+?)(?:\*([^*+]+?))?([+-]\d+)?")
"""An expression: a factor, one configuration value or the product of two, an offset."""
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
SAYS_NOTHING = "_"
Row = dict[str, Any]


@dataclass(frozen=True)
class TypeIndex:
    """Rows with ``type``, ``unfixed`` and ``classes``.

    Class -> patterns that a checkpoint ``need``s, ``may`` have or has ``ignored``, ``dims`` in the configuration's
    words, what ``says`` how a switch is set, and names that are ``tied``: of one tensor one name is enough.
    ``left_out``: type -> why the index lacks it.
    """

    transformers: str
    rows: list[Row]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TypeFit:
    """How a checkpoint's names differ from those of one class; ``clash`` is a value that two shapes contradict."""

    model_type: str
    model_class: str
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    config: dict[str, int | bool]
    unfixed: tuple[str, ...]
    clash: str = ""

    @property
    def differences(self) -> int:
        """How many tensors' patterns differ."""
        return len(self.missing) + len(self.extra)


@cache
def load_types(path: Path = INDEX) -> TypeIndex:
    """The index that comes with the package."""
    data = json.loads(lzma.decompress(path.read_bytes()))
    return TypeIndex(data["transformers"], data["types"], data.get("left_out", {}))


def save_types(index: TypeIndex, path: Path) -> None:
    """Write an index; the same index gives the same bytes."""
    data = {"transformers": index.transformers, "types": index.rows, "left_out": index.left_out}
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def search_types(found: Mapping[str, Shape], integers: frozenset[str], rows: list[Row]) -> list[TypeFit]:
    """How the checkpoint differs from each class that shares most of its names, the best first.

    Args:
        found: the checkpoint's tensors, names and shapes.
        integers: those of them that hold no floating numbers.
        rows: of the index.
    """
    members: dict[str, list[str]] = defaultdict(list)
    found = {modern(name): shape for name, shape in found.items() if name not in integers}
    for name in found:
        members[pattern(name)].append(name)
    here = set(members)
    scores = []
    for row in rows:
        for name, entry in row["classes"].items():
            known = here.intersection(entry["need"])
            known.update(first for first, other in entry.get("tied", ()) if first in entry["need"] and other in here)
            allowed = here.intersection(entry["may"])
            # Sets of patterns are cheap to compare: shapes are looked at for the few classes that are left.
            if 2 * len(known | allowed) > len(here):
                cost = len(entry["need"]) - len(known) + len(here) - len(known | allowed)
                scores.append((cost, row["type"], name))
    scores.sort()
    # The limit never cuts among equals: all that fit are to be named, and the answer must not hang on the alphabet.
    best = [score for score in scores if score[0] == (scores[0][0] if scores else 0) or score[0] == 0]
    kept = set(scores[:40]) | set(best)
    by_type = {row["type"]: row for row in rows}
    fits = [_compare(found, members, by_type[kind], name) for _, kind, name in sorted(kept)]
    return sorted(fits, key=lambda fit: (fit.differences, bool(fit.clash), fit.model_type, fit.model_class))


def modern(name: str) -> str:
    """A tensor's name as transformers reads it: the parameters of old layer norms have other names."""
    for old, new in LEGACY.items():
        name = f"{name.removesuffix(old)}{new}" if name.endswith(old) else name
    return name


def _compare(found: Mapping[str, Shape], members: Mapping[str, list[str]], row: Row, model_class: str) -> TypeFit:
    entry = row["classes"][model_class]
    need, may = set(entry["need"]), set(entry["may"])
    ignored = [re.compile(p) for p in entry.get("ignored", ())]
    extra = [
        kind for kind, names in members.items()
        if kind not in need and kind not in may and not any(p.search(names[0]) for p in ignored)
    ]  # fmt: skip
    ties = {first: other for first, other in entry.get("tied", ()) if first not in members and other in members}
    config, clash = _solve(found, members, _of_ties(entry["dims"], ties))
    for kind, key, present, _ in entry["says"]:
        if kind in members:  # where it is absent another switch may have taken it away: that says nothing
            config.setdefault(key, present)
    # After a contradiction nothing counts as known, whatever was read before it.
    solved = {part for key in config for part in [key, *key.split("*")]} if not clash else set()
    unfixed = tuple(
        dict.fromkeys([*row["unfixed"], *sorted(_mentioned(entry["dims"]) - solved), *(s[1] for s in entry["says"])])
    )
    # That a product is fixed says nothing of its factors.
    products = tuple(part for key in config if "*" in key for part in key.split("*") if part not in config)
    return TypeFit(
        row["type"], model_class, tuple(sorted(need.difference(members, ties))), tuple(extra), config,
        tuple(dict.fromkeys([*products, *(key for key in unfixed if key not in config)])), clash,
    )  # fmt: skip


def _of_ties(dims: Mapping[str, list[str]], ties: Mapping[str, str]) -> Mapping[str, list[str]]:
    """The dimensions of tied tensors that are stored under their other name."""
    return {**dims, **{other: dims[first] for first, other in ties.items() if first in dims}}


def _mentioned(dims: Mapping[str, list[str]]) -> set[str]:
    matches = (TERM.fullmatch(text) for row in dims.values() for text in row if text != SAYS_NOTHING)
    return {key for m in matches if m for key in (m.group(2), m.group(3)) if key}


def _solve(
    found: Mapping[str, Shape], members: Mapping[str, list[str]], dims: Mapping[str, list[str]]
) -> tuple[dict[str, Any], str]:
    """The configuration values that shapes fix, and a value that two of them contradict.

    A value that stands alone in a dimension is taken from there. What is a multiple of it, a product or a sum may be so
    by default only: such a dimension tells a value where nothing else does, and contradicts none.
    """
    config: dict[str, Any] = {}
    derived: dict[str, Any] = {}
    counts = _counts(found)
    for name, row in dims.items():
        shapes: list[Shape]
        # Not a tensor but a list: its length is what the configuration says.
        if name.endswith(".#") or name == "#":
            shapes = [(n,) for prefix, n in counts.items() if prefix == name or pattern(prefix) == name]
        elif name in found:
            shapes = [found[name]]
        else:
            shapes = [found[member] for member in members.get(name, ())]
        for shape in shapes:
            for key, value, alone in _values(shape, row):
                if alone and config.setdefault(key, value) != value:
                    return config, f"{key} is {config[key]} by one tensor and {value} by {name}"
                if not alone:
                    derived.setdefault(key, value)
                    derived[key] = value if derived[key] == value else None  # contradicted: nobody knows
    return {k: v for k, v in derived.items() if v is not None} | config, ""


def _values(shape: Shape, row: list[str]) -> Iterator[tuple[str, int | None, bool]]:
    """(key, value, whether it stands alone) for each dimension that says one; None if it is no such multiple."""
    for size, text in zip(shape, row, strict=False):
        match = TERM.fullmatch(text)
        if text == SAYS_NOTHING or match is None:
            continue
        factor, first, second, offset = match.groups()
        value, rest = divmod(size - int(offset or 0), int(factor or 1))
        yield "*".join(key for key in (first, second) if key), None if rest or value < 1 else value, text == first


def _counts(found: Mapping[str, Shape]) -> dict[str, int]:
    """``prefix.#`` with numbers in the prefix -> how many different numbers follow it."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in found:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                numbers[".".join([*parts[:i], "#"])].add(part)
    return {name: len(different) for name, different in numbers.items()}


def candidates(fits: list[TypeFit]) -> tuple[Candidate, ...]:
    """The model types whose names and shapes the checkpoint has, each with the classes that do."""
    # By type, since classes of one type share a configuration.
    exact: dict[str, list[TypeFit]] = defaultdict(list)
    for fit in fits:
        if not fit.differences and not fit.clash:
            exact[fit.model_type].append(fit)
    return tuple(
        Candidate("transformers", kind, None, tuple(f.model_class for f in group), group[0].config, group[0].unfixed)
        for kind, group in sorted(exact.items())
    )


def nearest_types(fits: list[TypeFit], patterns: int, most: int) -> list[Near]:
    """The model types that resemble a checkpoint of so many patterns; those that differ in the same way together.

    Of each type those classes only that differ least, which are the first.
    """
    groups: dict[object, list[TypeFit]] = {}
    best: dict[str, object] = {}
    for fit in fits:
        key = (fit.missing, fit.extra, fit.clash)
        # The fits come sorted, so the first of a type is its best.
        near = 2 * fit.differences < patterns and best.setdefault(fit.model_type, key) == key
        if near and (key in groups or len(groups) < most):
            groups.setdefault(key, []).append(fit)
    return [
        Near("transformers", tuple(dict.fromkeys(f.model_type for f in group)), group[0].missing, group[0].extra,
             hint=group[0].clash, classes=tuple(dict.fromkeys(f.model_class for f in group)))
        for group in groups.values()
    ]  # fmt: skip
