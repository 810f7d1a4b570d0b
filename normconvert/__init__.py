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
    from normconvert.api import convert, identify, inspect, verify
    from normconvert.apply.state import apply_plan
    from normconvert.benchmark.bench import bench
    from normconvert.exporting.export import export
    from normconvert.identification import Identification
    from normconvert.in_memory.conversion import convert_model
    from normconvert.plan.conversion_plan import Plan
    from normconvert.recipes.batch import run_recipes
    from normconvert.result import Report
    from normconvert.sources.converted import load
    from normconvert.tuning.swapping import swap
    from normconvert.verification.record_check import check

_WHERE = {
    "bench": "benchmark.bench",
    "check": "verification.record_check",
    "convert": "api",
    "apply_plan": "apply.state",
    "convert_adapter": "adapters.conversion",
    "convert_model": "in_memory.conversion",
    "identify": "api",
    "Identification": "identification",
    "inspect": "api",
    "Plan": "plan.conversion_plan",
    "Report": "result",
    "verify": "api",
    "load": "sources.converted",
    "export": "exporting.export",
    "run_recipes": "recipes.batch",
    "swap": "tuning.swapping",
}

__all__ = [
    "Identification",
    "Plan",
    "Report",
    "__version__",
    "apply_plan",
    "bench",
    "check",
    "convert",
    "convert_adapter",
    "convert_model",
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
