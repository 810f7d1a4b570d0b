"""What a model type's configuration values do to the names and shapes of its checkpoints, found by changing each.

Nothing here knows a model. A small model of the type is built on the meta device; then every value of its
configuration is changed, one at a time, and the names and shapes that `save_pretrained` would write are compared:
a dimension that doubles and trebles with a value is that value (times a whole number, plus another), one that follows
two values is their product, and a tensor that comes or goes with a switch tells how the switch was set.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from normconvert.identification.prints import pattern
from tools.census.zoo.dimension_expressions import collapsed, drop_refuted, expression_of
from tools.census.zoo.snapshots import LABELS, Snapshot, Values, changed, flat_values, nodes, snapshot, with_value

SOME_SIZE = 64
"""For a value that is None everywhere."""
MOST_CHOICES = 3
"""So many other words are tried for a value that is a word."""


@dataclass
class Found:
    """What changing the configuration showed.

    Attributes:
        need: patterns that were there in every build, and the patterns that were not -> :attr:`may`.
        dims: pattern, or name of one tensor, or ``prefix.#`` for a number of layers -> an expression for each
            dimension: ``hidden_size``, ``3*hidden_size``, ``max_position_embeddings+2``, ``num_heads*head_dim``, ``_``.
        says: (pattern, key, value if it is there, value if it is not).
        unfixed: keys that changed no name and no shape.
        failed: keys of which no other value built.
        tied: (name in ``need``, other name) of one tensor.
    """

    need: set[str]
    may: set[str]
    dims: dict[str, list[str]]
    says: list[tuple[str, str, Any, Any]]
    unfixed: list[str]
    failed: list[str] = field(default_factory=list)
    tied: set[tuple[str, str]] = field(default_factory=set)

    def entry(self) -> dict[str, Any]:
        """The row of a class in the index."""
        return {"need": sorted(self.need), "may": sorted(self.may), "dims": self.dims, "says": self.says,
                "tied": sorted(self.tied)}  # fmt: skip


def probe(cls: Any, config: Any, generic: frozenset[str], words: Mapping[str, list[Any]], others: list[Any]) -> Found:
    """Change every value of a small configuration and see what follows.

    Args:
        cls: a model class of transformers.
        config: a small configuration of it.
        generic: keys that every configuration has.
        words: last part of a key -> what other configurations have there: choices for words and for None.
        others: further configurations of the same type; expressions that do not hold there are dropped.
    """
    others = [*others, config]
    config = filled(cls, config, generic, words)
    base = snapshot(cls, config)
    values = flat_values(config, generic)
    seen = _Seen(base, values)
    for path, value in values.items():
        steps = _steps(value, _choices(path, words))
        seen.add_changes(path, changed(cls, config, path, steps, generic, base), tried=bool(steps))
    expressions = seen.expressions()
    for other in others:
        with suppress(Exception):
            one = snapshot(cls, other)
            seen.add(one, flat_values(other, generic))
            drop_refuted(expressions, nodes(one.shapes), flat_values(other, generic))
    may = (seen.may | seen.patterns) - seen.need
    return Found(seen.need, may, collapsed(expressions), seen.telling(), seen.unfixed, seen.failed, seen.ties)


class _Seen:
    """What the builds of one model type have shown so far.

    Args:
        base: the checkpoint of the configuration that is changed.
        values: of that configuration.
    """

    def __init__(self, base: Snapshot, values: Values) -> None:
        self.base, self.values = base, values
        self.start = nodes(base.shapes)
        self.patterns = {pattern(n) for n in base.shapes}
        self.need, self.may, self.ties = set(self.patterns), set[str](), set[tuple[str, str]]()
        self.moved: dict[tuple[str, int], dict[str, list[tuple[Any, int]]]] = defaultdict(lambda: defaultdict(list))
        self.says: list[tuple[str, str, Any, Any]] = []
        self.unfixed: list[str] = []
        self.failed: list[str] = []
        self.builds: list[tuple[Values, set[str]]] = []
        self.add(base, values)

    def add(self, seen: Snapshot, now: Values) -> set[str]:
        """Record one build; returns its patterns."""
        here = {pattern(n) for n in seen.shapes}
        self.builds.append((now, here))
        self.need.intersection_update(here)
        self.may.update(here, map(pattern, seen.tied), seen.buffers)
        self.ties.update((pattern(first), pattern(n)) for n, first in seen.tied.items() if first)
        return here

    def add_changes(self, path: str, built: list[tuple[Any, Snapshot]], *, tried: bool) -> None:
        """Record the builds with other values at ``path``; ``tried``: there were values to try."""
        if not built and tried:
            self.failed.append(path)
        touched = False
        for new, seen in built:
            touched |= self._add_change(path, new, seen)
        if not touched and path != LABELS:  # a class without labels does not need their number
            self.unfixed.append(path)

    def _add_change(self, path: str, new: Any, seen: Snapshot) -> bool:
        """Record one of them; returns whether anything has changed."""
        touched, value = False, self.values[path]
        here = self.add(seen, {**self.values, path: new})
        for place, old, now in _compared(self.start, nodes(seen.shapes)):
            self.moved[place][path].append((new, now))
            touched |= old != now
        if isinstance(value, bool):
            tied = {pattern(n) for n in [*self.base.tied, *seen.tied]}
            self.says += [(p, path, new, value) for p in sorted(here - self.patterns - tied)[:1]]
            self.says += [(p, path, value, new) for p in sorted(self.patterns - here - tied)[:1]]
        return touched or here != self.patterns or seen.tied != self.base.tied

    def expressions(self) -> dict[str, list[str]]:
        """What each dimension is, as far as the changes tell."""
        return {
            name: [
                expression_of(old, self.moved.get((name, axis), {}), self.values) for axis, old in enumerate(shape)
            ]
            for name, shape in self.start.items()
        }  # fmt: skip

    def telling(self) -> list[tuple[str, str, Any, Any]]:
        """The tensors that tell how a switch is set; one that another switch takes away as well does not."""
        return [
            (p, key, present, absent)
            for p, key, present, absent in self.says
            if all((p in here) == (now[key] == present) for now, here in self.builds if isinstance(now.get(key), bool))
        ]


def _choices(path: str, words: Mapping[str, list[Any]]) -> list[Any]:
    return words.get(re.sub(r"\[\d+\]$", "", path).rpartition(".")[2], [])


def _compared(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[str, int], int, int]]:
    """((name, axis), size before, size after) of all that both have."""
    for name, shape in before.items():
        if len(after.get(name, ())) == len(shape):
            for axis, (old, now) in enumerate(zip(shape, after[name], strict=True)):
                yield (name, axis), old, now


def filled(cls: Any, config: Any, generic: frozenset[str], words: Mapping[str, list[Any]]) -> Any:
    """The configuration with numbers for sizes that it leaves out and derives from others.

    GPT-2's ``n_inner`` is None by default, which means four times ``n_embd``. What number it stands for is told by the
    dimensions that follow it once it is one; that number must give the very same model.
    """
    base = snapshot(cls, config)
    start = nodes(base.shapes)
    for path, value in flat_values(config, generic).items():
        steps = [step for step in _steps(value, _choices(path, words)) if type(step) is int]
        if value is not None or not steps:
            continue
        votes: Counter[int] = Counter()
        for new, seen in changed(cls, config, path, steps, generic, base):
            for _, old, now in _compared(start, nodes(seen.shapes)):
                if old != now and now and old * new % now == 0:
                    votes[old * new // now] += 1
        for number, _ in votes.most_common(3):
            if same := [c for c in with_value(config, path, number) if _is_same(cls, c, path, number, generic, base)]:
                config = same[0]
                break
    return config


def _is_same(cls: Any, config: Any, path: str, value: int, generic: frozenset[str], expected: Snapshot) -> bool:
    with suppress(Exception):
        return flat_values(config, generic).get(path) == value and snapshot(cls, config) == expected
    return False


def of_class(cls: Any, config: Any, main: Found) -> dict[str, Any] | None:
    """The row of another class of the type; what changing its configuration would show is taken from the main class.

    The two share the base model, whose names have the class's prefix, or are bare if it is the base model itself.

    Args:
        cls: the other class.
        config: the small configuration that the main class was probed with.
        main: what was found for the main class.

    Returns:
        None if the class cannot be built.
    """
    try:
        seen = snapshot(cls, config)
    except Exception:
        return None
    here = {pattern(n) for n in seen.shapes}
    prefix = f"{cls.base_model_prefix}."
    theirs, ours = (any(n.startswith(prefix) for n in known) for known in (main.need, here))

    def spelt(name: str) -> str | None:
        if theirs == ours:
            return name if not ours or name.startswith(prefix) or name in here else None
        if ours:
            return prefix + name
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    optional = {new for name in main.may if (new := spelt(name)) is not None}
    need = here - optional
    may = optional | {pattern(n) for n in seen.tied} | seen.buffers
    ties = {(pattern(first), pattern(n)) for n, first in seen.tied.items() if first}
    ties |= {(a, b) for one, other in main.tied if (a := spelt(one)) is not None and (b := spelt(other)) is not None}
    dims = {new: row for name, row in main.dims.items() if (new := spelt(name)) is not None}
    dims.update(_label_dims(cls, config, seen))
    says = [(new, *rest) for name, *rest in main.says if (new := spelt(name)) is not None]
    return {"need": sorted(need), "may": sorted(may - need), "dims": dims, "says": says, "tied": sorted(ties)}


def _label_dims(cls: Any, config: Any, base: Snapshot) -> dict[str, list[str]]:
    """The dimensions that follow the number of labels."""
    more = 5
    for candidate in with_value(config, LABELS, config.num_labels + more):
        with suppress(Exception):
            after = snapshot(cls, candidate).shapes
            return {
                pattern(name): [LABELS if b - a == more else "_" for a, b in zip(shape, after[name], strict=True)]
                for name, shape in base.shapes.items() if name in after and after[name] != shape
            }  # fmt: skip
    return {}


def _steps(value: Any, words: list[Any]) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [type(value)(value * 2), type(value)(value * 3)] if value > 0 else [1, 2] if value == 0 else []
    if value is None:
        number = next((w for w in words if type(w) is int and 0 < w <= 64), SOME_SIZE)
        return [number, 2 * number, *[w for w in words if isinstance(w, bool)][:1]]
    from transformers.activations import ACT2FN

    return [word for word in words if isinstance(word, str) and word != value and word not in ACT2FN][:MOST_CHOICES]
