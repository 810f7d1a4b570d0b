"""Softmax attention and linear attention side by side, and where the cost model has them cross.

    python -m tools.benchmarks.attention

Batch 1, float32, one thread; milliseconds of CPU time, the median of many calls in alternation.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from normconvert.analysis.attention_costs import crossing, gain
from normconvert.runtime import LinearAttention

SHAPES = ((3, 64), (6, 64), (4, 16), (6, 32), (4, 128))
"""Heads and channels a head: ViT-Ti, ViT-S, and others."""
EDGES = (6, 8, 10, 12, 14, 17, 20, 28, 40, 56)
"""Height and width of the grid."""


def main() -> None:
    """Print a table for each shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for heads, size in SHAPES:
        points = [(edge * edge, *measured(heads, size, edge)) for edge in EDGES]
        print(f"{heads} heads of {size}: predicted crossing {crossing(heads, size)}, measured {_crossing(points):.0f}")
        for tokens, softmax, linear in points:
            print(
                f"  {tokens:5} tokens  softmax {softmax:8.3f}  linear {linear:8.3f}  "
                f"times as fast {softmax / linear:6.2f}  predicted {gain(heads, tokens, size):6.2f}"
            )


def measured(heads: int, size: int, edge: int) -> tuple[float, float]:
    """Milliseconds of both, with queries, keys and values laid out as a model has them."""
    query, key, value = torch.randn(1, edge * edge, 3, heads, size).permute(2, 0, 3, 1, 4)
    attention = LinearAttention(heads, size, (edge, edge))
    calls: list[Callable[[], Tensor]] = [
        lambda: F.scaled_dot_product_attention(query, key, value),
        lambda: attention(query, key, value),
    ]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(3 + 3000 // edge**2):
            for call, found in zip(calls, times, strict=True):
                start = time.process_time_ns()
                call()
                found.append((time.process_time_ns() - start) / 1e6)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def _crossing(points: list[tuple[int, float, float]]) -> float:
    """The tokens at which both take as long, between two that were measured; on a logarithmic scale."""
    before = None
    for tokens, softmax, linear in points:
        now = math.log(tokens), math.log(softmax / linear)
        if now[1] >= 0 and before is not None:
            return math.exp(before[0] + (now[0] - before[0]) * before[1] / (before[1] - now[1]))
        before = now
    return math.nan


if __name__ == "__main__":
    main()
