"""Time and memory of the fused models beside the original and beside no norms at all, for tools/demos/swap_demos.py.

The norm-free bound is the original with its norms taken away, which computes nonsense, quickly. The three take turns:
whatever else the machine does falls on all of them, and what counts are the ratios of one round.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconvert
from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.timing import Step, interleave, spread, warm_up
from normconvert.sources import open_source

SECONDS = 6.0
"""For one model and method."""
Row = dict[str, Any]


def inputs_of(model: str) -> dict[str, torch.Tensor]:
    """What the speed is measured on."""
    generator = torch.Generator().manual_seed(0)
    if model == "vit":
        return {"x": torch.randn(64, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(0, 2048, (8, 128), generator=generator)}


def allocated(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """Megabytes that one forward pass allocates."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(**inputs)
    return sum(max(0, event.self_cpu_memory_usage) for event in seen.events()) / 1e6


def measure(model: str, method: str, folder: Path, seconds: float = SECONDS) -> Row:
    """One row, as JSON-ready data, of the fused model in ``folder``."""
    original = open_source(f"demo:{model}").load().eval()
    inputs = inputs_of(model)
    norms = [name for name, module in original.named_modules() if isinstance(module, nn.LayerNorm)]
    models = {
        "original": original,
        "fused": normconvert.load(folder).eval(),
        "bound": without_norms(original, norms, (), lambda network: network(**inputs)),
    }
    steps = {name: Step(functools.partial(network, **inputs)) for name, network in models.items()}
    cpu = torch.device("cpu")
    with torch.inference_mode():
        quickest = min(warm_up(step, cpu) for step in steps.values())
        times, _ = interleave(steps, cpu, seconds, quickest)
    row = {
        "model": model,
        "name": method,
        "rounds": len(times["original"]),
        "milliseconds": {name: _quartiles([1000 * t for t in values]) for name, values in times.items()},
        "ratios": {
            name: _quartiles([a / b for a, b in zip(times[name], times["original"], strict=True)])
            for name in ("fused", "bound")
        },
        "allocated": {name: allocated(one, inputs) for name, one in models.items()},
    }
    print(json.dumps(row), flush=True)
    return row


def _quartiles(values: Sequence[float]) -> list[float]:
    found = spread(values)
    return [found.low, found.median, found.high]


def lines(rows: Sequence[Row]) -> list[str]:
    """The section of docs/swap.md."""
    if not rows:
        return [""]
    text = [
        "",
        "## Speed and memory",
        "",
        f"Of {min(r['rounds'] for r in rows)} rounds or more, in"
        " each of which original, fused model and norm-free bound run once: median "
        "milliseconds of a forward pass; the ratios to the original within a round, with their quartiles in brackets; "
        "megabytes that a pass allocates.",
        "",
        "| model | method | original | fused | bound | fused / original | bound / original | original MB | fused MB "
        "| bound MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ms, mb = row["milliseconds"], row["allocated"]
        cells = [f"{ms[name][1]:.2f}" for name in ("original", "fused", "bound")]
        cells += ["{1:.3f} ({0:.3f} … {2:.3f})".format(*row["ratios"][name]) for name in ("fused", "bound")]
        cells += [f"{mb[name]:.2f}" for name in ("original", "fused", "bound")]
        text.append(f"| {row['model']} | {row['name']} | {' | '.join(cells)} |")
    return [
        *text,
        "",
        "UN's paper reports 31 % speed and 18 % memory on a GPU, SLAB 16.2 against 18.6 ms (13 %). A fused model here "
        "runs the operations of the norm-free bound, plus the biases that the norms left; what is gained is the norms' "
        "share of the time, which grows with the device's speed at matrix products and falls with the width.",
        "",
    ]
