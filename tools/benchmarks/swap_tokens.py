"""Time and memory against the number of tokens: a ViT, without norms, with linear attention, and with both.

    python -m tools.benchmarks.swap_tokens

Random weights in the shapes of ViT-Ti and ViT-S without a class token, batch 1, float32; the four take turns. *repbn*
is the model without norms, whose linear maps have their biases already: a fused one runs the same operations.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

from normconvert.analysis.attention_costs import crossing
from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.timing import Step, interleave, spread, warm_up
from normconvert.runtime import apply_module_edits
from tools.benchmarks.swap_speed import allocated

SHAPES = {"ViT-Ti": (192, 3), "ViT-S": (384, 6)}
"""Width and heads; all have heads of 64 channels and 12 blocks."""
EDGES = (8, 14, 28, 56)
"""Height and width of the grid of patches."""
SECONDS = 10.0
"""For the four versions of one size."""
KINDS = ("original", "repbn", "sla", "slab")
Row = dict[str, Any]


def measure() -> list[Row]:
    """One row for each model and size, as JSON-ready data."""
    rows = []
    for name, (width, heads) in SHAPES.items():
        for edge in EDGES:
            image = torch.randn(1, 3, 16 * edge, 16 * edge)
            models = versions(width, heads, edge, image)
            memory = {kind: allocated(model, {"x": image}) for kind, model in models.items()}
            times = milliseconds(models, image)
            rows.append({"model": name, "heads": heads, "tokens": edge**2, "milliseconds": times, "megabytes": memory})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """The tables in Markdown, and where linear attention begins to be faster."""
    if not rows:
        return []
    text = [
        "Time against tokens: random weights in the shapes of ViT-Ti and ViT-S without a class token, batch 1, "
        "float32, one thread; median milliseconds of a forward pass, in turns, and megabytes that one allocates.",
        "",
        "| model | tokens | original, ms | repbn | sla | slab | original, MB | repbn | sla | slab |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row[unit][kind]:.1f}" for unit in ("milliseconds", "megabytes") for kind in KINDS]
        text.append(f"| {row['model']} | {row['tokens']} | {' | '.join(cells)} |")
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        points = [(row["tokens"], row["milliseconds"]["original"] / row["milliseconds"]["sla"]) for row in own]
        found.append(f"{name} {_crossing(points):.0f} (the cost model says {crossing(own[0]['heads'], 64)})")
    return [*text, "", f"Tokens from which on linear attention is faster: {', '.join(found)}.", ""]


def versions(width: int, heads: int, edge: int, image: torch.Tensor) -> dict[str, nn.Module]:
    """What is compared."""
    original: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16 * edge, embed_dim=width, num_heads=heads, class_token=False,
        global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    norms = [path for path, module in original.named_modules() if isinstance(module, nn.LayerNorm)]
    rows = [
        {"op": "attend", "path": f"blocks.{i}.attn", "heads": heads, "size": width // heads, "grid": [edge, edge]}
        for i in range(12)
    ]
    linear = copy.deepcopy(original)
    apply_module_edits(linear, rows)
    call = functools.partial(_call, image=image)
    return {
        "original": original,
        "repbn": without_norms(original, norms, (), call),
        "sla": linear,
        "slab": without_norms(linear, norms, (), call),
    }


def _call(model: nn.Module, image: torch.Tensor) -> object:
    with torch.no_grad():
        return model(image)


def milliseconds(models: dict[str, nn.Module], image: torch.Tensor) -> dict[str, float]:
    """The median of each version."""
    steps = {name: Step(functools.partial(model, image)) for name, model in models.items()}
    cpu = torch.device("cpu")
    with torch.inference_mode():
        quickest = min(warm_up(step, cpu) for step in steps.values())
        times, _ = interleave(steps, cpu, SECONDS, quickest)
    return {name: 1000 * spread(values).median for name, values in times.items()}


def _crossing(points: list[tuple[int, float]]) -> float:
    """The tokens at which both take as long, between two sizes; on a logarithmic scale."""
    for (few, slower), (many, faster) in itertools.pairwise(points):
        if slower < 1 <= faster:
            share = -math.log(slower) / (math.log(faster) - math.log(slower))
            return float(few * (many / few) ** share)
    return math.nan


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(lines(measure())))
