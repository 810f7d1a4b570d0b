"""What a small model's checkpoint would hold, and what it would hold with one value of the configuration changed."""

from __future__ import annotations

import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from normconvert.identification.model_types import modern
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
