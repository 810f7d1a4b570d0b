"""What a model type's configuration values do to the names and shapes of its checkpoints, found by changing each.

Nothing here knows a model. A small model of the type is built on the meta device; then every value of its
configuration is changed, one at a time, and the names and shapes that `save_pretrained` would write are compared:
a dimension that doubles and trebles with a value is that value (times a whole number, plus another), one that follows
two values is their product, and a tensor that comes or goes with a switch tells how the switch was set.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from normconvert.identification.model_types import TERM, modern
from normconvert.identification.prints import pattern
from tools.census.zoo.shrink import Level, _rebuild

STATISTICS = ("running_mean", "running_var")
SAME = Level(1, False, False, False)
NO_MATTER = re.compile(
    r".*(dropout|pdrop|drop_prob|drop_rate|drop_path|layerdrop|token_id|token_ids|initializer|init_std|use_cache|_loss|loss_|label|"
    r"output_|return_|gradient|torch_dtype|pad_id|_index$|mask_time|mask_feature|mask_ratio).*|.*_id$|model_type|_.*"
)
"""Values that change neither a checkpoint nor what a trained model computes; not asked about."""
LABELS = "num_labels"
SOME_SIZE = 64
"""For a value that is None everywhere."""
MOST_CHOICES = 3
"""So many other words are tried for a value that is a word."""
WITNESSES = 2
"""So many tensors of a stack of different ones say what a value is."""

Values = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of one model holds.

    Attributes:
        shapes: name on disk -> shape; of tied tensors one.
        tied: the other names of tied tensors -> the name in ``shapes``; writers may store either or both.
        buffers: patterns of floating buffers that may be stored.
    """

    shapes: Shapes
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()


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


def snapshot(cls: Any, config: Any) -> Snapshot:
    """Names and shapes that the class writes for a configuration."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"), _no_init():
        model = cls(copy.deepcopy(config))
    buffers = dict(model.named_buffers())
    state = model.state_dict(keep_vars=True)
    kept = {n: t for n, t in state.items() if n not in buffers or n.endswith(STATISTICS)}
    first: dict[int, str] = {}
    sources: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in kept.items():
        if first.setdefault(id(tensor), name) != name and name not in sources:
            sources[name] = first[id(tensor)]
    single = _on_disk(revert_weight_conversion, model, {n: t for n, t in kept.items() if n not in sources})
    tied: dict[str, str] = {}
    if sources.keys() & kept.keys():
        whole = _on_disk(revert_weight_conversion, model, kept)
        disk = {name: new for new, (name, _) in whole.items() if name}
        for new, (name, _) in whole.items():
            if new not in single:  # renamed as its source is, or one that no single tensor became
                tied[new] = disk.get(sources.get(name, ""), "")
    floats = frozenset(pattern(n) for n, b in buffers.items() if b.is_floating_point() and n not in kept)
    return Snapshot({name: shape for name, (_, shape) in single.items()}, tied, floats)


@contextmanager
def _no_init() -> Iterator[None]:
    """Random numbers for tensors on the meta device take half of the time that a model takes to build."""
    from torch.nn import init

    known = {n: f for n, f in vars(init).items() if inspect.isfunction(f) and n.endswith("_") and n[0] != "_"}
    for name in known:
        setattr(init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in known.items():
            setattr(init, name, function)


def _on_disk(revert: Any, model: Any, state: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name on disk -> (the model's name for it if it is that tensor unchanged, else nothing; shape)."""
    detached = {name: tensor.detach() for name, tensor in state.items()}
    names = {id(tensor): name for name, tensor in detached.items()}
    return {
        modern(name): (names.get(id(t), ""), tuple(t.shape)) for name, t in revert(model, detached).items()
        if t.is_floating_point()
    }  # fmt: skip


def flat_values(config: Any, generic: frozenset[str], path: str = "") -> Values:
    """The values of a configuration and of those inside it: ``text_config.hidden_size``, ``depths[0]``."""
    found: Values = {}
    for key, value in vars(config).items():
        if key in generic or NO_MATTER.fullmatch(key):
            continue
        name = f"{path}{key}"
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found.update(flat_values(value, generic, f"{name}."))
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple)) and len(value) <= 8 and all(type(v) is int for v in value):
            found.update({f"{name}[{i}]": v for i, v in enumerate(value)})
    if not path and isinstance(getattr(config, LABELS, None), int):
        found[LABELS] = config.num_labels  # a property
    return found


def with_value(config: Any, path: str, value: Any) -> Iterator[Any]:
    """Configurations with one value changed, in the ways there are to make one; those that raise are left out.

    All other values as they are; then with what the constructor derives derived anew; then simply set.
    """

    def change(holder: Any) -> Any:
        *parents, last = path.split(".")
        for parent in parents:
            holder = holder[parent] if isinstance(holder, dict) else getattr(holder, parent)
        name, _, index = last.partition("[")
        if index:
            values = list(holder[name] if isinstance(holder, dict) else getattr(holder, name))
            values[int(index[:-1])] = value
        new = values if index else value
        if isinstance(holder, dict):
            holder[name] = new
        else:
            setattr(holder, name, new)

    with suppress(Exception):
        data = config.to_dict()
        change(data)
        yield type(config).from_dict(data)
    plain = copy.deepcopy(config)
    with suppress(Exception):
        change(plain)
        yield _rebuild(plain, SAME, 0, None)
    with suppress(Exception):
        plain = copy.deepcopy(config)
        change(plain)
        yield plain


def changed(
    cls: Any, config: Any, path: str, values: list[Any], generic: frozenset[str], base: Snapshot
) -> list[tuple[Any, Snapshot]]:
    """(value, snapshot) for each of the values with which a model can be built, until one changes nothing."""
    found: list[tuple[Any, Snapshot]] = []
    for value in values:
        seen, tried = None, []
        for candidate in with_value(config, path, value):
            with suppress(Exception):
                said = candidate.to_dict()
                if said in tried or flat_values(candidate, generic).get(path) != value:
                    continue
                tried.append(said)
                seen = snapshot(cls, candidate)
            # What a switch does may be derived when the configuration is made: every way is tried until one shows it.
            if seen is not None and (type(value) in (int, float) or seen != base):
                break
        if seen is not None:
            found.append((value, seen))
            if seen == base and type(value) in (int, float):
                break
    return found


def nodes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes, and for every ``prefix.#`` with numbers in place of ``#`` how many there are."""
    counts: dict[str, set[str]] = defaultdict(set)
    for name in shapes:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                counts[".".join([*parts[:i], "#"])].add(part)
    return {**shapes, **{name: (len(numbers),) for name, numbers in counts.items()}}


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
    start = nodes(base.shapes)
    patterns = {pattern(n) for n in base.shapes}
    need, may, ties = set(patterns), set[str](), set[tuple[str, str]]()
    moved: dict[tuple[str, int], dict[str, list[tuple[Any, int]]]] = defaultdict(lambda: defaultdict(list))
    says: list[tuple[str, str, Any, Any]] = []
    unfixed, failed = [], []

    builds: list[tuple[Values, set[str]]] = []

    def add(seen: Snapshot, now: Values) -> set[str]:
        here = {pattern(n) for n in seen.shapes}
        builds.append((now, here))
        need.intersection_update(here)
        may.update(here, map(pattern, seen.tied), seen.buffers)
        ties.update((pattern(first), pattern(n)) for n, first in seen.tied.items() if first)
        return here

    add(base, values)
    for path, value in values.items():
        steps = _steps(value, _choices(path, words))
        built = changed(cls, config, path, steps, generic, base)
        if not built and steps:
            failed.append(path)
        touched = False
        for new, seen in built:
            here = add(seen, {**values, path: new})
            for place, old, now in _compared(start, nodes(seen.shapes)):
                moved[place][path].append((new, now))
                touched |= old != now
            touched |= here != patterns or seen.tied != base.tied
            if isinstance(value, bool):
                tied = {pattern(n) for n in [*base.tied, *seen.tied]}
                says += [(p, path, new, value) for p in sorted(here - patterns - tied)[:1]]
                says += [(p, path, value, new) for p in sorted(patterns - here - tied)[:1]]
        if not touched and path != LABELS:  # a class without labels does not need their number
            unfixed.append(path)
    expressions = {
        name: [_expression(old, moved.get((name, axis), {}), values) for axis, old in enumerate(shape)]
        for name, shape in start.items()
    }
    for other in others:
        with suppress(Exception):
            seen = snapshot(cls, other)
            add(seen, flat_values(other, generic))
            _check(expressions, nodes(seen.shapes), flat_values(other, generic))
    # A tensor that another switch takes away as well does not tell how this one was set.
    says = [
        (p, key, present, absent)
        for p, key, present, absent in says
        if all((p in here) == (now[key] == present) for now, here in builds if isinstance(now.get(key), bool))
    ]
    return Found(need, (may | patterns) - need, _collapsed(expressions), says, unfixed, failed, ties)


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


def _expression(old: int, moved: Mapping[str, list[tuple[Any, int]]], values: Values) -> str:
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


def _check(expressions: dict[str, list[str]], seen: Mapping[str, tuple[int, ...]], values: Values) -> None:
    """Drop what does not hold for another configuration of the type."""
    for name, row in expressions.items():
        for axis, expression in enumerate(row):
            expected = evaluate(expression, values)
            if expected is not None and name in seen and (len(seen[name]) <= axis or seen[name][axis] != expected):
                row[axis] = "_"


def _collapsed(expressions: dict[str, list[str]]) -> dict[str, list[str]]:
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
