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
    from normconvert.adapters.conversion import convert_adapter
    from normconvert.api import convert, identify, inspect
    from normconvert.benchmark.bench import bench
    from normconvert.exporting.export import export
    from normconvert.identification import Identification
    from normconvert.recipes.batch import run_recipes
    from normconvert.result import Report
    from normconvert.sources.converted import load
    from normconvert.tuning.swapping import swap
    from normconvert.verification.equivalence import verify
    from normconvert.verification.record_check import check

_WHERE = {
    "bench": "benchmark.bench",
    "check": "verification.record_check",
    "convert": "api",
    "convert_adapter": "adapters.conversion",
    "identify": "api",
    "Identification": "identification",
    "inspect": "api",
    "Report": "result",
    "verify": "verification.equivalence",
    "load": "sources.converted",
    "export": "exporting.export",
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
    "convert_adapter",
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
