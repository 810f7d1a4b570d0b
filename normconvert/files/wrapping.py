"""Names of tensors without what training puts before them: data parallelism, compilation, sharding.

The one home of these prefixes: every reader of weight files takes the names from here. What an outer *model* puts
before the names of an inner one (Lightning's ``model.``) may be a part of the name as well; only the class tells which
of :func:`prefixes` it is, see :mod:`normconvert.sources.fitting`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

RESERVED = frozenset({"_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."})
"""Parts of a name that no model uses: taken out wherever they stand, since a part of a model may be wrapped."""
PARALLEL = "module."
"""Taken away where a name begins with it: no model that is known has a part of that name at its top."""


def unwrapped(names: Iterable[str]) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Names in a file -> the model's own, and what was taken out of them.

    Two names that would become one stay as they are, and so do all others: nobody knows then which is meant.

    >>> unwrapped(["module._orig_mod.head.weight"])
    ({'module._orig_mod.head.weight': 'head.weight'}, ('module.', '_orig_mod.'))
    """
    found: dict[str, str] = {}
    taken: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        kept = [part for part in parts if f"{part}." not in RESERVED]
        removed = [f"{part}." for part in parts if f"{part}." in RESERVED]
        while len(kept) > 1 and f"{kept[0]}." == PARALLEL:
            removed.insert(0, PARALLEL)
            del kept[0]
        taken.update(dict.fromkeys(removed))
        found[name] = ".".join(kept) or name
    if not taken or len(set(found.values())) < len(found):
        return {name: name for name in found}, ()
    return found, tuple(taken)


WRAPPERS = ("base_model.model.", "model.", "net.")
"""May be taken away even where not all names have them: a training module keeps its losses and metrics beside the
model."""
PART, FEWEST = 0.2, 4
"""And so may any other that so large a part of the names has, and so many: of a student and its teacher, say."""
DEEPEST = 4
"""Prefixes before a prefix."""


def prefixes(names: Iterable[str]) -> Iterator[str]:
    """What an outer model may have put before the names, the shortest first.

    >>> list(prefixes(["net.model.a.weight", "net.model.a.bias"]))
    ['net.', 'net.model.', 'net.model.a.']
    """
    names, found = list(names), [""]
    for _ in range(DEEPEST):
        found = [prefix + first for prefix in found for first in _first_parts(names, prefix)]
        yield from found


def _first_parts(names: list[str], prefix: str) -> list[str]:
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    known = [wrapper for wrapper in WRAPPERS if any(name.startswith(wrapper) for name in inner)][:1]
    counts = Counter(name.partition(".")[0] for name in inner if "." in name)
    least = max(PART * len(names), FEWEST)
    # A number is one of several blocks, and no model.
    often = [f"{part}." for part, n in counts.items() if len(counts) == 1 or (n >= least and not part.isdigit())]
    return list(dict.fromkeys([*known, *(part for part in often if not any(one.startswith(part) for one in known))]))
