"""By how much the ways out move that a plan lists: hidden states, features, intermediate layers.

Their values are kept while a model runs on the probes: the first call of each, since it is a figure, not a verdict.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.tracing.output_paths import tensors_in
from normconvert.verification.fidelity import distance

Values = dict[str, tuple[Tensor, ...]]
Rows = Sequence[Mapping[str, Any]]


@contextmanager
def kept_exits(model: nn.Module, rows: Rows, inputs: Mapping[str, Any]) -> Iterator[Values]:
    """Path of a module -> the first floating tensor that it returns; name of a method -> all of them.

    Args:
        model: run within the block; its methods are called after it.
        rows: ``shifted_doors`` of a plan.
        inputs: of the model, for its methods.
    """
    modules, found = dict(model.named_modules()), Values()
    with ExitStack() as stack:
        for path in {str(row["output"]) for row in rows} & modules.keys() - {""}:
            stack.callback(modules[path].register_forward_hook(_keeping(found, path)).remove)
        yield found
    for name in dict.fromkeys(str(row["door"]) for row in rows if not row["output"]):
        # A way out may be none of the model's own methods: timm's `features_only` makes another model.
        if callable(method := getattr(model, name, None)):
            taken = inspect.signature(method).parameters
            with contextlib.suppress(Exception), torch.no_grad():
                _keep(found, name, method(**{k: v for k, v in inputs.items() if k in taken}), None)


def _keeping(found: Values, path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _keep(found, path, output, 1)

    return hook


def _keep(found: Values, name: str, output: Any, first: int | None) -> None:
    if values := list(tensors_in(output).values())[:first]:
        found.setdefault(name, tuple(value.clone() for value in values))


def movements(rows: Rows, before: Values, after: Values) -> dict[str, float]:
    """Way out -> the largest ||y' - y|| / ||y|| of what it returns; inf where it has another shape."""
    found: dict[str, float] = {}
    for row in rows:
        key = str(row["output"] or row["door"])
        if key in before and key in after:
            door = str(row["door"])
            sizes = [distance(b, a).relative for a, b in zip(before[key], after[key], strict=False)]
            found[door] = max(found.get(door, 0.0), *sizes)
    return found
