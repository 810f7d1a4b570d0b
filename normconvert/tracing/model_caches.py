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
from typing import Any

from torch import Tensor, nn

_KEPT = ("torch", "sympy", "functools", "typing", "re", "numpy", "huggingface_hub", "rich", "typer")
"""Packages whose memoised functions hold no tensors of a model."""

_HELD = ("_parameters", "_buffers", "_modules")
"""Dictionaries of a module that make it what it is."""


@contextmanager
def fresh_caches(model: nn.Module) -> Iterator[None]:
    """Empty functions' caches before and after; attributes, hooks and tables of ``model`` are afterwards as before."""
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
    """Empty every memoised function of model code, wherever it hides (decorators keep them in closures)."""
    # A tuple, since another thread may import something while they are counted.
    for function in _memoised(sum(map(_may_hold_models, tuple(sys.modules)))):
        function.cache_clear()


@functools.lru_cache(maxsize=1)
def _memoised(modules: int) -> list[Any]:
    """All memoised functions; they are made when modules are loaded, so a new search waits for new modules.

    A search looks at every object there is, so modules whose functions are of no interest do not count.
    """
    # The type is private: nothing public tells a memoised function that hides in a closure.
    wrappers = (value for value in gc.get_objects() if type(value) is functools._lru_cache_wrapper)
    # This module's own table is left, or each call would search through all objects again.
    own = sys.modules[__name__].__name__
    return [w for w in wrappers if not str(w.__module__).startswith((own, *_KEPT)) and not _standard(w)]


def _may_hold_models(module: str) -> bool:
    return not module.startswith(_KEPT) and module.partition(".")[0] not in sys.stdlib_module_names


def _standard(function: Any) -> bool:
    return str(function.__module__).partition(".")[0] in sys.stdlib_module_names
