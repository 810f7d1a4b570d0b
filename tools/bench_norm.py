"""Time the kernels that normconvert.runtime chooses from, beside the fused LayerNorm of the original model.

    python tools/bench_norm.py [--threads N] [--device cuda] [--dtype float32 bfloat16] [--backward] [--json FILE]

The kernels of one cell run interleaved, round by round, so that whatever else the machine does hits them alike; a row
shows LayerNorm's median time and every kernel's median ratio to LayerNorm in the same round (below 1 is faster). The
last lines give from how many numbers in the input on RMSNorm's own kernel beats LayerNorm: the runtime's constants
``LAYER_NORM_BELOW`` come from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconvert import runtime

KERNELS: dict[str, runtime.Kernel] = {
    "layer_norm": runtime._layer_norm,
    "in_place": runtime._in_place,
    "fused_rms": runtime._fused_rms,
    "formula": runtime._formula,
}
FORWARD_ONLY = ("in_place",)
SIZES = (192, 384, 768, 2048)
TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048)
AFFINE = {"none": (False, False), "weight": (True, False), "weight+bias": (True, True)}


def main() -> None:
    """Parse the command line, run the grid, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--compile", action="store_true", help="time the compiled kernels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), eps 1e-5, x is mean-free")
    rows = []
    for dtype in options.dtype:
        for size in options.sizes:
            for tokens in options.tokens:
                for affine in AFFINE:
                    row = cell(options, getattr(torch, dtype), size, tokens, affine)
                    rows.append(row)
                    ratios = "  ".join(f"{name} {value:5.2f}" for name, value in row["ratio"].items())
                    print(
                        f"{dtype:9} size {size:5} tokens {tokens:5} {affine:12} "
                        f"layer_norm {row['layer_norm_us']:9.1f} us  {ratios}",
                        flush=True,
                    )
    for dtype in options.dtype:
        for affine in AFFINE:
            print(f"{dtype}, {affine}: in_place beats layer_norm from {crossing(rows, dtype, affine)} numbers on")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def cell(options: argparse.Namespace, dtype: torch.dtype, size: int, tokens: int, affine: str) -> dict[str, Any]:
    """One row: all kernels on one input of shape (1, tokens, size), interleaved."""
    device = torch.device(options.device)
    x = torch.randn(1, tokens, size, device=device)
    x = (x - x.mean(-1, keepdim=True)).to(dtype)
    has_weight, has_bias = AFFINE[affine]
    weight = torch.randn(size, device=device, dtype=dtype) if has_weight else None
    bias = torch.randn(size, device=device, dtype=dtype) if has_bias else None
    leaves = [nn.Parameter(t) for t in (x, weight, bias) if t is not None] if options.backward else []

    def runner(kernel: runtime.Kernel) -> Callable[[], object]:
        called: Any = torch.compile(kernel, dynamic=False) if options.compile else kernel
        if not options.backward:
            return torch.no_grad()(lambda: called(x, weight, bias, -1, 1e-5))
        inputs: list[Tensor | None] = [*leaves, None, None]
        gradient = torch.randn_like(x)
        return lambda: torch.autograd.grad(called(*inputs[:3], -1, 1e-5), leaves, gradient)

    runners = {
        name: runner(kernel) for name, kernel in KERNELS.items() if not (options.backward and name in FORWARD_ONLY)
    }
    repeats = max(2, min(100, 400_000 // (tokens * size)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(options.rounds + 1):
        for name, run in runners.items():
            elapsed = clock(run, repeats, device)
            if turn:  # the first round warms up
                times[name].append(elapsed)
    base = times["layer_norm"]
    del times["layer_norm"]
    ratio = {name: statistics.median(a / b for a, b in zip(t, base, strict=True)) for name, t in times.items()}
    return {
        "device": options.device, "dtype": str(dtype).removeprefix("torch."), "size": size, "tokens": tokens,
        "affine": affine, "layer_norm_us": statistics.median(base) * 1e6, "ratio": ratio,
    }  # fmt: skip


def clock(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds for one call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def crossing(rows: list[dict[str, Any]], dtype: str, affine: str) -> int | None:
    """The smallest input from which on in_place is the faster one at every larger size; None if there is none."""
    ratios = {
        row["size"] * row["tokens"]: row["ratio"]["in_place"]
        for row in rows
        if (row["dtype"], row["affine"]) == (dtype, affine) and "in_place" in row["ratio"]
    }
    best = None
    for numbers in sorted(ratios, reverse=True):
        if ratios[numbers] >= 1:
            break
        best = numbers
    return best


if __name__ == "__main__":
    main()
