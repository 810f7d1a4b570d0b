"""Which basis should crmsnorm store a stream in? Rounding and time of both, measured.

    python tools/benchmarks/basis.py [--models demo:gpt2 demo:vit] [--wide 768]

Rounding: the error of the converted model in its dtype against float64, divided by the original's own (below 1 is
better than the original). Time: the norm over d - 1 numbers beside the fused LayerNorm over d with weight and bias.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BASES = ("isometric", "paper")
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    """Parse the command line, measure, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo:gpt2", "demo:vit"])
    parser.add_argument("--wide", nargs="*", type=int, default=[768], help="widths of random GPT-2 models")
    parser.add_argument("--sizes", nargs="*", type=int, default=[768, 2048])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 32, 512])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = [*options.models, *(random_gpt2(Path(folder) / f"gpt2-{width}", width) for width in options.wide)]
        print("| model | dtype | " + " | ".join(f"rounding, {basis}" for basis in BASES) + " |")
        print("| --- | --- |" + " --- |" * len(BASES))
        for model in models:
            for dtype in DTYPES:
                figures = [rounding(model, dtype, basis, Path(folder)) for basis in BASES]
                print(f"| {Path(model).name} | {dtype} | " + " | ".join(f"{x:.2f}" for x in figures) + " |", flush=True)
    print(f"\n| d | tokens | LayerNorm, µs | {' | '.join(f'{b}, ×' for b in BASES)} |\n|" + " --- |" * 5)
    for size in options.sizes:
        for tokens in options.tokens:
            base, ratios = times(size, tokens)
            print(
                f"| {size} | {tokens} | {base * 1e6:.1f} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |", flush=True
            )


def random_gpt2(folder: Path, width: int) -> str:
    """A GPT-2 with random weights that hide nothing, on disk."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.support.perturb import perturb

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=997, n_positions=64, n_embd=width, n_layer=4, n_head=width // 64)
    model: Any = perturb(GPT2LMHeadModel(config).eval())
    model.save_pretrained(folder)
    return str(folder)


def rounding(model: str, dtype: str, basis: str, folder: Path) -> float:
    """The worst output's error in ``dtype`` over the original's own."""
    from normconvert import convert

    report = convert(model, folder / "out", "crmsnorm", dtype=dtype, basis=basis, overwrite=True)
    assert report.fidelity is not None
    assert report.fidelity.rounding is not None
    return report.fidelity.rounding


def times(size: int, tokens: int) -> tuple[float, list[float]]:
    """Seconds of LayerNorm, and the ratio of each basis' norm to it; medians of interleaved rounds."""
    from normconvert.runtime import CRMSNorm

    x, small = torch.randn(tokens, size), torch.randn(tokens, size - 1)
    weight, bias = torch.randn(size), torch.randn(size)
    runs: list[Callable[[], object]] = [lambda: F.layer_norm(x, (size,), weight, bias)]
    for basis in BASES:
        module = CRMSNorm(size, basis=basis).eval()
        runs.append(lambda module=module: module(small))  # type: ignore[misc]
    repeats = max(5, min(300, 2_000_000 // (tokens * size)))
    spent: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for _ in range(21):
            for run, seconds in zip(runs, spent, strict=True):
                start = time.perf_counter()
                for _ in range(repeats):
                    run()
                seconds.append((time.perf_counter() - start) / repeats)
    base = spent[0]
    return statistics.median(base), [statistics.median(a / b for a, b in zip(s, base, strict=True)) for s in spent[1:]]


if __name__ == "__main__":
    main()
