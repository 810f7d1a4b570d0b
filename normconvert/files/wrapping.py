"""Names of tensors without what training puts before them: data parallelism, compilation, sharding.

The one home of these prefixes: every reader of weight files takes the names from here. What an outer *model* puts
before the names of an inner one (Lightning's ``model.``) may be a part of the name as well; only the class tells, see
:mod:`normconvert.sources.fitting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
