"""Is the stored result as good a rounding of the truth as the original is?

The original's own error on a probe is one draw of the error that a checkpoint of its dtype has there, and may be small
by chance or by structure: an image of zeros meets no rounding at all. So errors are pooled over the realistic probes,
and where one draw does not settle it, others are made of the original with its weights moved by half a unit
(:mod:`normconvert.verification.moved_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from normconvert.tracing.probes import Probe
from normconvert.verification.fidelity import ratio
from normconvert.verification.lazy_weights import LazyWeight
from normconvert.verification.moved_weights import FLOAT32, moved
from normconvert.verification.probe_runs import Run, run_model
from normconvert.verification.run_comparison import Distances, compare_runs, rank

ROUNDING_TOLERANCE = 3.0
"""docs/design.md says why."""
SURE = 1.5
"""Below this the original's own error is enough to tell."""
DRAWS = {"quick": 2, "standard": 3, "thorough": 8}
"""Level of the verification -> models with moved weights."""


@dataclass(frozen=True)
class Rounding:
    """The converted model's error beside the original's, both pooled over the probes; the worst output's.

    Attributes:
        ratio: the quotient; None if there is nothing to compare.
        output: the name of the output.
        probe: on which the converted model is furthest off.
        error: of the converted model.
        expected: of the original.
        draws: models with moved weights among those that `expected` was estimated from.
    """

    ratio: float | None = None
    output: str = ""
    probe: str = ""
    error: float = 0.0
    expected: float = 0.0
    draws: int = 0

    def reason(self, allowed: float, dtype: torch.dtype) -> str:
        """What is wrong, for one that failed, and what to do."""
        name = str(dtype).removeprefix("torch.")
        if math.isinf(self.error):
            return (
                f"rounding errors are infinite: output {self.output!r} of probe {self.probe!r} is missing or not "
                f"finite in {name}, where the original's is; a dtype of larger range may hold it (bfloat16, float32)"
            )
        moved = f" and {self.draws} versions of it with weights moved by half a unit" if self.draws else ""
        return (
            f"rounding errors are {self.ratio:.3g} times the original's (allowed {allowed:g}): output {self.output!r} "
            f"is {self.error:.2g} off the float64 truth, most on probe {self.probe!r}, the original{moved} "
            f"{self.expected:.2g}; stored in {name} the result is a worse rounding than the original: try another "
            "--dtype (float32), or leave out --fold"
        )


def pooled(converted: Distances, originals: Sequence[Distances], eps: float) -> Rounding:
    """For each output the root mean square of its relative errors over the probes, converted/original; the largest.

    Args:
        converted: of the converted model from the truth.
        originals: the same of the original, one or more draws.
        eps: of the dtype.
    """
    worst = Rounding()
    for name in dict.fromkeys(name for _, name in converted):
        found = {probe: rank(d.relative) for (probe, n), d in converted.items() if n == name}
        expected = [rank(d.relative) for one in originals for (_, n), d in one.items() if n == name]
        a, b = (math.sqrt(sum(e * e for e in errors) / max(len(errors), 1)) for errors in (found.values(), expected))
        # The worst output, not the mean: one that is spoilt must not hide among many that are not.
        quotient = ratio(a, b, eps)
        if worst.ratio is None or rank(quotient) > rank(worst.ratio):
            worst = Rounding(quotient, name, max(found, key=found.__getitem__), a, b)
    return worst


def measure_rounding(
    converted: Distances,
    original: Distances,
    *,
    remake: Callable[[], nn.Module],
    probes: Sequence[Probe],
    expected: Run,
    dtype: torch.dtype,
    shifted: frozenset[str],
    tolerance: float,
    level: str,
    seed: int,
    casts: bool = False,
) -> Rounding:
    """The ratio of the errors, from as many draws of the original's as it takes.

    Args:
        converted: distances of the converted model from the truth, on the probes that decide.
        original: of the original.
        remake: makes the original in its dtype once more, or returns it.
        probes: on which both ran.
        expected: the truth, NaN where nothing can be said.
        dtype: of the checkpoints.
        shifted: outputs that are compared without their mean.
        tolerance: that the ratio is held against.
        level: how many draws.
        seed: of the run.
        casts: the model casts to float32 whatever its dtype, so that in float64 it rounds as in float32.
    """
    unit = FLOAT32 if casts and dtype == torch.float64 else 1
    eps = torch.finfo(dtype).eps * unit
    first = pooled(converted, [original], eps)
    # In float64 the original is the truth itself, and its error no draw.
    own = [original] if dtype != torch.float64 else []
    if first.ratio is None or math.isinf(first.error) or (own and first.ratio <= min(SURE, tolerance)):
        return first
    model = remake()
    if any(isinstance(p, LazyWeight) for p in model.parameters()):
        return first
    names = {probe for probe, _ in converted}
    run = partial(run_model, model, [p for p in probes if p.name in names], dtype=dtype, seed=seed)
    draws: list[Distances] = []
    for draw in range(DRAWS[level]):
        with moved(model, draw + 1, unit=unit):
            found = compare_runs(expected, run(), shifted)
        # A draw that leaves the dtype's range says nothing.
        draws.append({k: d for k, d in found.items() if k in converted and math.isfinite(d.relative)})
    return replace(pooled(converted, own + draws, eps), draws=len(draws))
