"""Time the kernels that normconvert.runtime chooses from, and the module that chooses, beside torch's nn.LayerNorm.

    python -m tools.benchmarks.norm [--device cuda] [--dtype float32 bfloat16] [--threads N] [--compile] [--backward]
                               [--json docs/results/norm-cpu.json] [--write]

What is timed in one cell runs interleaved, round by round, so that whatever else the machine does hits all alike. A row
shows nn.LayerNorm's median time and, for each kernel, the median ratio to nn.LayerNorm in the same round (below 1 is
faster). ``module`` is RMSNorm as a conversion leaves it.

Memory is kept by the process, not given back to the system after each call: with one operation in a loop the C library
would fetch fresh pages for every result, which takes longer than the norm, and only for some of the kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.benchmark.machine import machine
from normconvert.report.benchmark import machine_in_words
from normconvert.runtime import RMSNorm, kernels
from tools.benchmarks.fuse import SECTIONS
from tools.docs.pages import write_section

KERNELS: dict[str, kernels.Kernel] = {"fused_rms": kernels.fused_rms, "formula": kernels.formula}
SIZES = (192, 384, 768, 2048)
TOKENS = (1, 8, 32, 197, 512, 2048)
AFFINE = {"none": (False, False), "weight": (True, False), "weight+bias": (True, True)}
BASE = "nn.LayerNorm"


def main() -> None:
    """Parse the command line, run the grid, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--affine", nargs="+", choices=AFFINE, default=list(AFFINE))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--compile", action="store_true", help="time everything compiled")
    parser.add_argument("--json", type=Path, help="write the rows; those of other settings in the file stay")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and docs/results/ (--json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), eps 1e-5")
    rows = []
    for dtype in options.dtype:
        for size in options.sizes:
            for tokens in options.tokens:
                for affine in options.affine:
                    rows.append(row := cell(options, dtype, size, tokens, affine))
                    ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
                    what = f"{dtype:9} size {size:5} tokens {tokens:5} {affine:12}"
                    print(f"{what} {row['microseconds']:9.1f} us  {ratios}", flush=True)
    docs = Path(__file__).parents[2] / "docs"
    file = options.json or (docs / "results" / f"norm-{options.device}.json" if options.write else None)
    if file:
        save(file, rows)
    if options.write and file:
        write_section(docs / "performance.md", "norm", section(json.loads(file.read_text())), SECTIONS)


def section(document: dict[str, Any]) -> str:
    """The section of the page: the module's time relative to nn.LayerNorm's, for the three kinds of parameters."""
    lines = [
        "## The norm itself",
        "",
        "Written by `python -m tools.benchmarks.norm --write`, which has all kernels' figures in docs/results/. Time "
        "of RMSNorm as a conversion leaves it, relative to nn.LayerNorm's (below 1 is faster), medians of interleaved "
        "rounds, for each setting of weight and bias. "
        f"{machine_in_words(document['machine'])}.",
        "",
        "| dtype | mode | size | tokens | LayerNorm | neither | weight | both |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        key = tuple(row[name] for name in ("dtype", "mode", "size", "tokens"))
        groups.setdefault(key, {})[row["affine"]] = row
    for key, rows in groups.items():
        if set(rows) != set(AFFINE):
            continue
        both = rows["weight+bias"]
        ratios = [rows[name]["ratio"]["module"] for name in AFFINE]
        shown = [*map(str, key), f"{both['microseconds']:.1f} µs", *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def keep_memory() -> None:
    """Have the C library keep what is freed, where it can be told to (glibc)."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 30)


def settings(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two rows have in common if one measures the other again."""
    return tuple(row[key] for key in ("device", "dtype", "threads", "size", "tokens", "affine", "mode"))


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add the rows to a file, in place of older ones of the same settings."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = {settings(row): row for row in [*old, *rows]}
    device = torch.device(rows[0]["device"])
    document = {"machine": machine(device), "rows": list(kept.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def cell(options: argparse.Namespace, dtype_name: str, size: int, tokens: int, affine: str) -> dict[str, Any]:
    """One row: everything on one input of shape (1, tokens, size), interleaved."""
    device, dtype = torch.device(options.device), getattr(torch, dtype_name)
    x = torch.randn(1, tokens, size, device=device, dtype=dtype)
    has_weight, has_bias = AFFINE[affine]
    weight = nn.Parameter(torch.randn(size, device=device, dtype=dtype)) if has_weight else None
    bias = nn.Parameter(torch.randn(size, device=device, dtype=dtype)) if has_bias else None
    runs = dict(_runners(options, x, weight, bias))
    repeats = max(2, min(100, 400_000 // (tokens * size)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, run in runs.items():
            elapsed = clock(run, repeats, device)
            if turn:  # the first round warms up
                times[name].append(elapsed)
    base = times.pop(BASE)
    ratio = {name: statistics.median(a / b for a, b in zip(t, base, strict=True)) for name, t in times.items()}
    return {
        "device": options.device, "dtype": dtype_name, "threads": options.threads, "size": size, "tokens": tokens,
        "affine": affine,
        "mode": ("compiled" if options.compile else "eager") + (" with backward" if options.backward else ""),
        "microseconds": round(statistics.median(base) * 1e6, 2),
        "ratio": {name: round(value, 3) for name, value in ratio.items()},
    }  # fmt: skip


def _runners(
    options: argparse.Namespace, x: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and function of all that is timed: modules first, then the kernels by themselves."""
    size = x.shape[-1]
    norm = nn.LayerNorm(size, elementwise_affine=weight is not None, bias=bias is not None).to(x.device, x.dtype)
    if weight is not None:
        norm.weight = weight
    if bias is not None:
        norm.bias = bias
    modules: dict[str, nn.Module] = {
        BASE: norm,
        "module": RMSNorm(size, weight=weight, bias=bias),
    }
    if options.backward:
        x = nn.Parameter(x)
    gradient = torch.randn_like(x)

    def timed(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        called: Any = torch.compile(function, dynamic=False) if options.compile else function
        if options.backward:
            return lambda: torch.autograd.grad(called(), leaves, gradient)
        return torch.no_grad()(called)

    def of_module(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: module(x)

    def of_kernel(kernel: kernels.Kernel) -> Callable[[], Tensor]:
        return lambda: kernel(x, weight, bias, -1, 1e-5)

    for name, module in modules.items():
        yield name, timed(of_module(module.eval()), [x, *module.parameters()])
    for name, kernel in KERNELS.items():
        yield name, timed(of_kernel(kernel), [x, *(p for p in (weight, bias) if p is not None)])


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


if __name__ == "__main__":
    main()
