"""Whole models: original, converted, and without norms; writes its section of docs/performance.md.

    python -m tools.benchmarks.models [--small] [--device cuda] [--seconds S] [--models gpt2 vit_tiny …] [--write]

The checkpoints are made here: the shapes of well-known models with random, perturbed weights. Each is converted by
``rmsnorm`` and by ``crmsnorm``, and all versions take turns in one process, on a CPU layer by layer
(tools/benchmarks/lockstep.py). On two idle cores everything takes half an hour; ``--small`` tries it in
three. ``--write`` writes docs/performance.md and docs/results/models-DEVICE.json: a run on a GPU leaves the rows of the
CPU as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconvert
from normconvert.benchmark.compare import compare
from normconvert.benchmark.machine import machine
from normconvert.benchmark.result import BOUND, CONVERTED, ORIGINAL, WORTH, Row
from normconvert.benchmark.versions import own_memory, versions
from normconvert.benchmark.workloads import Workload, grid
from normconvert.files.uninitialised import NoRandomInit
from normconvert.sources import open_source
from normconvert.sources.converted import load
from tests.support.perturb import perturb
from tools.benchmarks.lockstep import lockstep
from tools.docs.pages import write_section

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = (
    "models",
    "share",
    "growth",
    "conversion",
    "methods",
    "verified",
    "verified-busy",
    "verdicts",
    "verification",
    "norm",
    "writers",
    "basis",
    "fuse-bn",
    "worth",
)
"""The sections of docs/performance.md, in order; each tool of this folder writes its own."""
SLOWEST, SHARE = 0.99, 0.8
"""The criteria: converted/original in every cell; how much of the way to the bound, where it is above WORTH."""
CRMSNORM = "crmsnorm"
BATCHES, LENGTHS = (1, 8), (32, 256)
LONG = 1024
"""Tokens from which a cell is given three times as long: its calls take seconds."""


@dataclass(frozen=True)
class Shape:
    """A model to be made: its title, its library, and what builds it (with sizes of a toy, if asked to)."""

    title: str
    library: str
    build: Callable[[bool], nn.Module]


def _language_model(kind: str, **sizes: Any) -> Callable[[bool], nn.Module]:
    def build(small: bool) -> nn.Module:
        import transformers

        config_class = getattr(transformers, f"{kind}Config")
        model_class = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
        if kind == "GPT2":
            toy = {"n_layer": 2, "n_embd": 192, "n_head": 3, "vocab_size": 1000}
        else:
            toy = {"num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 3, "vocab_size": 1000}
            toy |= {"OPT": {"ffn_dim": 768, "word_embed_proj_dim": 192}}.get(kind, {"intermediate_size": 768})
        model: nn.Module = model_class(config_class(**{**sizes, **(toy if small else {})}))
        return model

    return build


def _vit(name: str) -> Callable[[bool], nn.Module]:
    def build(small: bool) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **({"depth": 2} if small else {}))
        return model

    return build


SHAPES = {
    "gpt2": Shape("GPT-2 small", "transformers", _language_model("GPT2")),
    "opt": Shape("OPT-125M", "transformers", _language_model("OPT")),
    "pythia": Shape(
        "Pythia-160M", "transformers",
        _language_model(
            "GPTNeoX", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            vocab_size=50304,
        ),
    ),
    "vit_tiny": Shape("ViT-Ti/16", "timm", _vit("vit_tiny_patch16_224")),
    "vit_small": Shape("ViT-S/16", "timm", _vit("vit_small_patch16_224")),
    "vit_base": Shape("ViT-B/16", "timm", _vit("vit_base_patch16_224")),
}  # fmt: skip
COMPILED = {("gpt2", "forward", 1, 32), ("vit_tiny", "forward", 1, None)}
"""Cells that are measured under torch.compile on a CPU as well: compiling four versions takes minutes."""


def make(shape: Shape, folder: Path, small: bool) -> Path:
    """The checkpoint, with random perturbed weights."""
    with NoRandomInit():
        model: Any = shape.build(small).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    perturb(model)
    if shape.library == "timm":
        from timm.models import save_for_hf

        save_for_hf(model, folder, model_args={"depth": 2} if small else {}, safe_serialization=True)
    else:
        model.save_pretrained(folder)
    return folder


def measure(
    name: str, small: bool, device: torch.device, dtypes: Sequence[torch.dtype], seconds: float, folder: Path
) -> Iterator[tuple[str, Row]]:
    """(dtype, row) of every cell of one model."""
    source_folder = make(SHAPES[name], folder / "source", small)
    for method in ("rmsnorm", CRMSNORM):
        normconvert.convert(source_folder, folder / method, method=method, verify=False)
    source = open_source(str(source_folder))
    plan = normconvert.inspect(source_folder, "rmsnorm").plan
    lengths = LENGTHS if SHAPES[name].library == "transformers" else None
    works = grid(source.skeleton(), BATCHES, lengths)
    for dtype in dtypes:
        models = versions(source, folder / "rmsnorm", plan, works[0], dtype, device)
        models[CRMSNORM] = own_memory(load(folder / CRMSNORM, dtype=dtype, device=device))
        for mode, work in cells(name, works, device):
            chosen = models if mode != "compiled" or device.type != "cpu" else _without(models, CRMSNORM)
            long = work.batch * (work.length or 197) >= LONG
            share = seconds * (3 if long else 1)
            yield str(dtype).removeprefix("torch."), compare(chosen, work, mode, dtype, device, share, lockstep)
        del models


def _without(models: dict[str, nn.Module], name: str) -> dict[str, nn.Module]:
    return {key: model for key, model in models.items() if key != name}


def cells(name: str, works: Sequence[Workload], device: torch.device) -> Iterator[tuple[str, Workload]]:
    """Modes and workloads: all eager; compiled the few of :data:`COMPILED`, on a GPU all, and captured in graphs."""
    for work in works:
        yield "eager", work
    for work in works:
        if device.type != "cpu" or (name, work.kind, work.batch, work.length) in COMPILED:
            yield "compiled", work
    if device.type == "cuda":
        for work in works:
            yield "graphs", work


def verdict(row: Row) -> str:
    """What the row says about the criteria; empty if it meets them."""
    speed, share = row.speedup[CONVERTED].median, row.share
    missed = [f"{speed:.3f} < {SLOWEST}"] if speed < SLOWEST else []
    missed += [f"{share:.0%} < {SHARE:.0%}"] if share is not None and share < SHARE else []
    return ", ".join(missed)


def tables(title: str, dtype: str, rows: Sequence[Row]) -> Iterator[str]:
    """One model's table."""
    yield f"**{title}**, {dtype}"
    yield ""
    yield "| | original | rmsnorm | crmsnorm | bound | of the way | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if row.failures.get(ORIGINAL) or CONVERTED not in row.speedup:
            yield f"| {row.name} | not possible: {next(iter(row.failures.values()), '')} | | | | | |"
            continue
        base = row.milliseconds[ORIGINAL]
        shown = [f"{base.median:.4g} ms"]
        for version in (CONVERTED, CRMSNORM, BOUND):
            speed = row.speedup.get(version)
            shown.append(f"{speed.median:.3f} ± {(speed.high - speed.low) / 2:.3f}" if speed is not None else "–")
        share = f"{row.share:.0%}" if row.share is not None else ""
        yield f"| {row.name} | {' | '.join(shown)} | {share} | {verdict(row) or '✓'} |"
    yield ""


def document(
    device: torch.device, found: dict[str, dict[str, list[Row]]], seconds: float, small: bool
) -> dict[str, Any]:
    """What was measured, as JSON-ready data."""
    return {
        "machine": machine(device),
        "seconds": round(seconds),
        "small": small,
        "models": {
            name: {dtype: [row.to_json() for row in rows] for dtype, rows in by_dtype.items()}
            for name, by_dtype in found.items()
        },
    }


def section(results: dict[str, dict[str, Any]]) -> str:
    """The section of the page, from what was measured on each device."""
    lines = [
        "## Whole models",
        "",
        "Written by `python -m tools.benchmarks.models --write`. Random perturbed weights in the shapes of well-known "
        "models. *original* is the time of a call; the other columns are how much faster than the original a version "
        "is (median of the rounds, ± half of what lies between the quartiles): converted by `rmsnorm`, by `crmsnorm`, "
        "and without the norms that `rmsnorm` converts, which is the *bound*. *of the way* is the part of the time "
        f"that the bound saves which `rmsnorm` saves, where the bound is above {WORTH} ×. The last column has what "
        f"misses the criteria: at least {SLOWEST} × the original's speed in every cell, at least {SHARE:.0%} of the "
        "way. On a CPU the versions take turns layer by layer, and their weights are put elsewhere in memory now and "
        "then, since the machine's speed and the place of the weights each make a hundredth or more; compiled versions "
        "take turns call by call. Decoding is one more token after 32 others, with a cache; prompts are read as "
        "`generate` reads them.",
        "",
    ]
    for device, data in results.items():
        rows = {
            (name, dtype): [Row.from_json(row) for row in found]
            for name, by_dtype in data["models"].items()
            for dtype, found in by_dtype.items()
        }
        about = data["machine"]
        lines += [
            f"### {device.upper()}",
            "",
            f"{about.get('gpu') or about['processor']}, {about['threads']} threads, torch {about['torch']}, "
            f"transformers {about['transformers']}.{' Toy sizes.' if data['small'] else ''}",
            "",
            *_summary([row for found in rows.values() for row in found]),
            "",
            *_beside_the_paper(device, [row for found in rows.values() for row in found]),
        ]
        for (name, dtype), found in rows.items():
            lines += tables(SHAPES[name].title, dtype, found)
    if "cuda" not in results:
        lines += [
            "### CUDA",
            "",
            "Not measured: no GPU was at hand. `python -m tools.benchmarks.models --device cuda --write`.",
            "",
        ]
    return "\n".join(lines)


def _summary(rows: Sequence[Row]) -> list[str]:
    measured = [row for row in rows if CONVERTED in row.speedup]
    speeds = [row.speedup[CONVERTED].median for row in measured]
    worth = [row.share for row in measured if row.share is not None]
    bounds = [row.speedup[BOUND].median for row in measured if BOUND in row.speedup]
    compressed = [row.speedup[CRMSNORM].median for row in measured if CRMSNORM in row.speedup]
    if not measured:
        return ["Nothing could be measured."]
    return [
        f"In {sum(s >= SLOWEST for s in speeds)} of {len(speeds)} cells the converted model has at least {SLOWEST} × "
        f"the original's speed; the slowest has {min(speeds):.3f} ×, the fastest {max(speeds):.3f} ×. The bound is "
        f"above {WORTH} × in {len(worth)} cells; `rmsnorm` goes {SHARE:.0%} of the way or more in "
        f"{sum(s >= SHARE for s in worth)} of them.",
        "",
        f"The bound, which does strictly less than the original, has {min(bounds, default=1.0):.3f} to "
        f"{max(bounds, default=1.0):.3f} × its speed: what is below 1 is chance. `crmsnorm` has at least {SLOWEST} × "
        f"in {sum(s >= SLOWEST for s in compressed)} of {len(compressed)} cells, {min(compressed, default=1.0):.3f} to "
        f"{max(compressed, default=1.0):.3f} ×.",
    ]


def _beside_the_paper(device: str, rows: Sequence[Row]) -> list[str]:
    """How the gain compares with what arXiv 2305.14858 reports."""
    shares = [1 - 1 / row.speedup[BOUND].median for row in rows if BOUND in row.speedup]
    if device != "cpu" or not shares:
        return []
    return [
        "The paper (arXiv 2305.14858) reports 1 to 10% less time for training and inference, on GPUs. Here the norms "
        f"take {statistics.median(shares):.1%} of a call (median of the cells; at most {max(shares):.1%}), and no "
        "conversion of them can bring more: on a CPU torch's LayerNorm is one kernel that passes once over the tokens, "
        "while the products beside it read all weights. What is gained here is the form that engines and quantisers "
        "ask for, not time. On a GPU a norm also waits for its launch and for memory, and other rows have to tell.",
        "",
    ]


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=45.0, help="for each cell; five rounds at least")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--small", action="store_true", help="toy sizes and one second a cell")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    seconds = 1.0 if arguments.small else arguments.seconds
    found: dict[str, dict[str, list[Row]]] = {}
    start = time.perf_counter()
    for name in arguments.models:
        folder = Path(tempfile.mkdtemp())
        try:
            for dtype, row in measure(name, arguments.small, device, dtypes, seconds, folder):
                found.setdefault(name, {}).setdefault(dtype, []).append(row)
                lines = list(tables(SHAPES[name].title, dtype, [row]))
                print(f"{time.perf_counter() - start:5.0f} s {name} {lines[4]}", flush=True)
        finally:
            shutil.rmtree(folder)
    data = document(device, found, time.perf_counter() - start, arguments.small)
    print(section({device.type: data}))
    if arguments.write:
        write(device.type, data)


def write(device: str, data: dict[str, Any]) -> None:
    """Keep the results, and write the section from all that are there."""
    results = DOCS / "results"
    results.mkdir(exist_ok=True)
    (results / f"models-{device}.json").write_text(json.dumps(data, indent=1) + "\n")
    devices = {path.stem.removeprefix("models-"): path for path in sorted(results.glob("models-*.json"))}
    every = {name: json.loads(path.read_text()) for name, path in devices.items()}
    write_section(DOCS / "performance.md", "models", section(every), SECTIONS)


if __name__ == "__main__":
    main()
