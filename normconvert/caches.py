"""Memoised functions of model code, emptied around every run on fake tensors.

Model code keeps small tables (relative positions, rotary angles) behind ``functools.lru_cache``. A fake tensor made while
tracing must not turn up in a real run, nor a real one in a trace.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_KEPT = ("torch", "sympy", "functools", "typing", "re", "numpy", "huggingface_hub", "rich", "typer")
"""Packages whose memoised functions hold no tensors of a model."""


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty them before and after."""
    clear_caches()
    try:
        yield
    finally:
        clear_caches()


def clear_caches() -> None:
    """Empty every memoised function and method defined at the top level of a loaded module."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in sys.stdlib_module_names or name.startswith(_KEPT):
            continue
        if not issubclass(type(module), ModuleType):
            continue
        for value in list(vars(module).values()):
            _clear(value)
            if type(value) is type and value.__module__ == name:
                for member in list(vars(value).values()):
                    _clear(getattr(member, "__func__", member))


def _clear(value: object) -> None:
    if type(value) is functools._lru_cache_wrapper:
        value.cache_clear()
