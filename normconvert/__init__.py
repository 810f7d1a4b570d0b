"""normconvert converts the normalisation layers of trained models, exactly where that is possible.

>>> import normconvert
>>> report = normconvert.convert("gpt2", "out/")  # doctest: +SKIP
>>> model = normconvert.load("out/")  # doctest: +SKIP

Importing the package is cheap: torch, transformers and timm are imported when they are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import convert, inspect
    from .benchmark.bench import bench
    from .checking import check
    from .exporting import export
    from .identification import Identification, identify
    from .loading import load
    from .recipes.batch import run_recipes
    from .result import Report
    from .tuning.swapping import swap
    from .verification import verify

_WHERE = {
    "bench": "benchmark.bench",
    "check": "checking",
    "convert": "api",
    "identify": "identification",
    "Identification": "identification",
    "inspect": "api",
    "Report": "result",
    "verify": "verification",
    "load": "loading",
    "export": "exporting",
    "run_recipes": "recipes.batch",
    "swap": "tuning.swapping",
}

__all__ = [
    "Identification",
    "Report",
    "__version__",
    "bench",
    "check",
    "convert",
    "export",
    "identify",
    "inspect",
    "load",
    "run_recipes",
    "swap",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'normconvert' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
