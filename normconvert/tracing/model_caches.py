"""Memoised values of model code, set back around every run on fake tensors.

Model code keeps small tables (relative positions, rotary angles) behind ``functools.lru_cache`` or in attributes and
dictionaries of its modules. A fake tensor made while tracing must not turn up in a real run or in another trace, nor a
real one in a trace.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_KEPT = frozenset(("torch", "sympy", "numpy", "huggingface_hub", "rich", "typer", "normconvert"))
"""Packages whose memoised functions hold no tensors of a model, as those of the standard library do not."""

_HELD = ("_parameters", "_buffers", "_modules")
"""Dictionaries of a module that make it what it is."""


@contextmanager
def fresh_caches(model: nn.Module) -> Iterator[None]:
    """Empty caches of tensors before and after; attributes, hooks and tables of ``model`` are afterwards as before."""
    tables: list[dict[str, Any]] = [table for module in model.modules() for table in _tables(module)]
    before = [dict(table) for table in tables]
    clear_caches()
    try:
        yield
    finally:
        clear_caches()
        for table, held in zip(tables, before, strict=True):
            table.clear()
            table.update(held)


def _tables(holder: object) -> Iterator[dict[str, Any]]:
    """The attributes of a module, its tables, and those of the plain objects that it keeps, a cache of texts say."""
    yield vars(holder)
    for key, value in vars(holder).items():
        if type(value) in (dict, OrderedDict):
            if key not in _HELD:
                yield value
        # Objects of objects are left alone: they may refer to each other in circles.
        elif isinstance(holder, nn.Module) and _is_plain(value):
            yield from _tables(value)


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
    wrappers = (value for value in gc.get_objects() if type(value) is functools._lru_cache_wrapper)
    return [w for w in wrappers if _may_hold_models(str(w.__module__))]


def _may_hold_models(module: str) -> bool:
    package = module.partition(".")[0]
    return package not in _KEPT and package not in sys.stdlib_module_names


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
        if isinstance(value, Tensor) or len(seen) > LARGEST:
            return True
        if id(value) in seen or isinstance(value, (type, ModuleType, nn.Module)):
            continue
        seen[id(value)] = value
        # Not a function's globals, from where everything can be reached.
        work += [value.__closure__] if isinstance(value, FunctionType) else gc.get_referents(value)
    return False
