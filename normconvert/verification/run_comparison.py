"""Two runs of the same probes side by side: distances of outputs, rounding against rounding, what is seen in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from normconvert.tracing.probes import Probe
from normconvert.verification.fidelity import (
    Distance,
    agreement,
    distance,
    is_shifted,
    next_token_loss,
    scores,
)
from normconvert.verification.probe_runs import Run

Distances = dict[tuple[str, str], Distance]
"""(probe, output) -> how far two models are apart there."""


def compare_runs(expected: Run, found: Run, shifted: frozenset[str] = frozenset()) -> Distances:
    """(probe, output) -> how far the two are apart; inf where only one of them has the output."""
    result = {}
    for probe, outputs in expected.outputs.items():
        other = found.outputs.get(probe, {})
        for name in dict.fromkeys([*outputs, *other]):
            if name in outputs and name in other:
                result[probe, name] = distance(other[name], outputs[name], shifted=is_shifted(name, shifted))
            else:
                result[probe, name] = Distance(math.inf, 1.0)
    return result


def without(run: Run, names: frozenset[str]) -> Run:
    """A run without the outputs of these names: what is in another basis is not held against what it was."""
    outputs = {p: {n: v for n, v in o.items() if not is_shifted(n, names)} for p, o in run.outputs.items()}
    return replace(run, outputs=outputs)


def _both_known(true: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (torch.isfinite(true) == torch.isfinite(value)) & ~torch.isnan(value)


def rank(value: float) -> float:
    """An error as a number to sort by: NaN, which compares with nothing, is the largest."""
    return math.inf if math.isnan(value) else value


def comparable_part(truth: Run, original: Run) -> Run:
    """The truth on the probes of ``original``, NaN where the original in its dtype has no finite value or a mask's."""
    result = Run()
    for probe, outputs in original.outputs.items():
        if probe in truth.outputs:
            true = truth.outputs[probe]
            result.outputs[probe] = {
                name: torch.where(_both_known(true[name], value), true[name], math.nan)
                if name in true and true[name].shape == value.shape
                else true.get(name, value)
                for name, value in outputs.items()
            }
    return result


def task_metrics(original: Run, converted: Run) -> tuple[float, float]:
    """(share of positions with the same top class, mean KL divergence in nats) over all probes."""
    same, positions, divergence = 0, 0, 0.0
    for probe, outputs in original.outputs.items():
        a, b = scores(outputs), scores(converted.outputs.get(probe, {}))
        if a is None or b is None or a.shape != b.shape:
            continue
        found = agreement(a, b)
        same, positions, divergence = same + found[0], positions + found[1], divergence + found[2]
    return (same / positions, divergence / positions) if positions else (1.0, 0.0)


def loss_difference(probes: Sequence[Probe], original: Run, converted: Run) -> float | None:
    """Mean next-token loss on the text probes, converted minus original; None without such probes."""
    differences = []
    for probe in probes:
        if probe.name.startswith("text") and probe.name in converted.outputs:
            a = next_token_loss(original.outputs[probe.name], probe.inputs)
            b = next_token_loss(converted.outputs[probe.name], probe.inputs)
            if a is not None and b is not None and math.isfinite(a):
                differences.append(b - a)
    return sum(differences) / len(differences) if differences else None
