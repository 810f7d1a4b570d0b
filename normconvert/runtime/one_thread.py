"""One lock for all who build, load or trace models in this process.

The libraries build models in a state of the whole process: the default dtype, initialisation switched off, functions
replaced for a while. Two threads that load at once take each other's state and get wrong models without an error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def process_lock() -> Any:
    """The lock, whoever asks first: the package, and each copy of this code that a checkpoint brings along."""
    return vars(torch).setdefault("_normconvert_lock", threading.RLock())


def one_at_a_time(function: Function) -> Function:
    """``function``, run by one thread of the process at a time; it may call others that are."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with process_lock():
            return function(*args, **kwargs)

    return alone  # type: ignore[return-value]
