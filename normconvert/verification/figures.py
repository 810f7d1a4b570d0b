"""What is said of a verification beside its figures: a row for each probe, and remarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normconvert.verification.probe_runs import Run
from normconvert.verification.proof import UNITS, Proof
from normconvert.verification.rounding import Rounding
from normconvert.verification.run_comparison import Distances


@dataclass(frozen=True)
class Errors:
    """Distances from the truth in the dtype."""

    original: Distances
    converted: Distances


def finite(run: Run) -> bool:
    """Whether all outputs of a run are."""
    return all(bool(torch.isfinite(value).all()) for outputs in run.outputs.values() for value in outputs.values())


def skipped_probes(original: Run, truth: Run) -> dict[str, str]:
    """Probe -> why nothing can be said of it."""
    return {**original.failures, **{name: f"in float64: {why}" for name, why in truth.failures.items()}}


def probe_rows(skipped: Mapping[str, str], algebra: Distances, errors: Errors) -> list[dict[str, Any]]:
    """What the report says of each probe and output."""
    rows: list[dict[str, Any]] = [{"probe": name, "skipped": why} for name, why in skipped.items()]
    for key in dict.fromkeys([*algebra, *errors.converted]):
        sides = {"algebra": algebra, "original_error": errors.original, "converted_error": errors.converted}
        known = {name: side[key] for name, side in sides.items() if key in side}
        figures = {name: known[name].relative if name in known else None for name in sides}
        left_out = max(d.left_out for d in known.values())
        rows.append({"probe": key[0], "output": key[1], **figures, **({"left_out": left_out} if left_out else {})})
    return rows


def remarks_on(proof: Proof, errors: Errors, rounding: Rounding, overflown: torch.dtype | None) -> list[str]:
    """Sentences on what was left out, what decided and how."""
    found = []
    if overflown is not None:
        name = str(overflown).removeprefix("torch.")
        found.append(f"the original has values that are not finite in {name}: held against it in bfloat16")
    shares: dict[str, float] = {}
    for (probe, _), d in [*proof.distances.items(), *errors.converted.items()]:
        if d.left_out:
            shares[probe] = max(shares.get(probe, 0.0), d.left_out)
    for probe, share in shares.items():
        found.append(f"{share:.0%} of the values on probe {probe!r} left out: the original has no finite ones there")
    for (probe, output), tolerance in proof.tolerances.items():
        found.append(
            f"output {output!r} on probe {probe!r} is ill-conditioned and held to {tolerance:.1g}: {UNITS:g} times "
            "what moving the original's own weights by one unit of float64 changes there"
        )
    if rounding.draws:
        found.append(
            f"rounding held against the original and {rounding.draws} draws of it, weights moved by half a unit"
        )
    return found
