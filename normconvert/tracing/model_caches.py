"""Memoised values of model code, set back around every run on fake tensors.

Model code keeps small tables (relative positions, rotary angles) behind ``functools.lru_cache`` or in attributes and
dictionaries of its modules. A fake tensor made while tracing must not turn up in a real run or in another trace, nor a
real one in a trace.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from normconvert.compat.torch import pytree

_KEPT = frozenset(("torch", "sympy", "numpy", "huggingface_hub", "rich", "typer", "normconvert"))
"""Packages whose memoised functions hold no tensors of a model, as those of the standard library do not."""

_HELD = ("_parameters", "_buffers", "_modules")
"""Dictionaries of a module that make it what it is."""


@contextmanager
def fresh_caches(model: nn.Module) -> Iterator[list[str]]:
    """Empty caches of tensors before and after; attributes, hooks and tables of ``model`` are afterwards as before.

    Yields:
        Names, known at the end, of the attributes and tables where a run left tensors: whoever looks there later finds
        them without the model returning them.
    """
    tables = [row for path, module in model.named_modules() for row in _tables(path, module)]
    before = [(copy.copy(table), where, table) for where, table in tables]
    kept: list[str] = []
    clear_caches()
    try:
        yield kept
    finally:
        clear_caches()
        for held, where, table in before:
            kept.extend(f"{where}{name}" for name in _new_tensors(table, held, not where or where.endswith(".")))
            table.clear()
            table.extend(held) if isinstance(table, list) else table.update(held)


def _tables(path: str, holder: object) -> Iterator[tuple[str, Any]]:
    """Name and table: a module's attributes, its tables and lists, and those of the plain objects that it keeps."""
    where = f"{path}." if path else ""
    yield where, vars(holder)
    for key, value in vars(holder).items():
        if type(value) in (dict, OrderedDict, list, set):
            if key not in _HELD:
                yield f"{where}{key}", value
        # Objects of objects are left alone: they may refer to each other in circles.
        elif isinstance(holder, nn.Module) and _is_plain(value):
            yield from _tables(f"{where}{key}", value)


def _new_tensors(table: Any, held: Any, attributes: bool) -> Iterator[str]:
    """Attributes that hold floating tensors and did not before; of a container one empty name, if it has such items."""
    rows = table.items() if isinstance(table, dict) else enumerate(table)
    old = held.values() if isinstance(held, dict) else held
    new = [str(key) for key, value in rows if key not in _HELD and _holds_floats(value) and _is_none_of(value, old)]
    yield from new if attributes else [""] * bool(new)


def _is_none_of(value: object, others: Iterable[object]) -> bool:
    return all(value is not one for one in others)


def _holds_floats(value: object) -> bool:
    leaves = pytree.tree_leaves(value) if isinstance(value, (list, tuple, dict)) else [value]
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1 for leaf in leaves)


def _is_plain(value: object) -> bool:
    """Whether a value is an object of model code that is neither a module nor a tensor nor a configuration."""
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return not hasattr(value, "to_dict") and _may_hold_models(type(value).__module__)


def clear_caches() -> None:
    """Empty every memoised function of model code that holds tensors, wherever it hides (decorators keep them too).

    What a caller has memoised beside them, texts or whole models, is kept.
    """
    # A tuple, since another thread may import something while they are counted.
    loaded = sum(map(_may_hold_models, tuple(sys.modules)))
    for function in _memoised(loaded, len(vars(sys.modules["__main__"]))):
        if _holds_tensors(function):
            function.cache_clear()


@functools.lru_cache(maxsize=1)
def _memoised(modules: int, names: int) -> list[Any]:
    """All memoised functions; a new search waits for new modules, or new names in a notebook.

    A search looks at every object there is, so modules whose functions are of no interest do not count.
    """
    # The type is private: nothing public tells a memoised function that hides in a closure.
    wrappers = (value for value in _all_objects() if type(value) is functools._lru_cache_wrapper)
    return [w for w in wrappers if _may_hold_models(str(w.__module__))]


def _all_objects() -> list[Any]:
    """What the garbage collector knows of, and what a server has taken out of its sight before it forked."""
    if not gc.get_freeze_count():
        return gc.get_objects()
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()


@functools.cache
def _may_hold_models(module: str) -> bool:
    package = module.partition(".")[0]
    return package not in _KEPT and package not in sys.stdlib_module_names


_PLAIN = frozenset((str, int, float, bool, bytes, type(None), type, ModuleType))
"""Nothing hangs on these, or what does is no model's; most of what is memoised is texts and truth values."""
LARGEST = 2000
"""Objects behind a cache that are looked at before it is emptied unseen."""


def _holds_tensors(function: Any) -> bool:
    """Whether a memoised function holds tensors, in its results or what hangs on them; modules are not looked into."""
    if not function.cache_info().currsize:
        return False
    seen: dict[int, object] = {}
    # The garbage collector knows what the cache holds; nothing else tells.
    work: list[object] = gc.get_referents(function)
    while work:
        value = work.pop()
        if type(value) in _PLAIN:
            continue
        if isinstance(value, Tensor) or len(seen) > LARGEST:
            return True
        if id(value) in seen or isinstance(value, (type, ModuleType, nn.Module)):
            continue
        seen[id(value)] = value
        # Not a function's globals, from where everything can be reached.
        work += [value.__closure__] if isinstance(value, FunctionType) else gc.get_referents(value)
    return False
