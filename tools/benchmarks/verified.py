"""What a verification costs: whole commands with and without it, side by side.

    python -m tools.benchmarks.verified [--only NAME] [--repeats 3] [--busy] [--large] [--write]

Makes checkpoints in known shapes with random weights in a temporary folder, converts each with ``--no-verify`` and with
every level in turn, as processes of their own, and prints the medians of seconds, processor time and peak memory.
``--busy`` asks something else: what ``standard`` takes beside a process that never rests, in turns with an idle
machine. ``--large`` adds a shape of 1.0B parameters in float32. ``--write`` writes the section of docs/performance.md;
for figures the machine must be idle. About 20 minutes, 15 with ``--busy``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from tools.benchmarks.convert import Run, measure

DOCS = Path(__file__).parents[2] / "docs"
TARGETS = {"gpt2-124m": 1.6, "resnet50": 1.6, "densenet121": 1.6, "vit-b16": 2.0, "whisper-base": 2.5}
"""Checkpoint -> what `standard` may take, as a multiple of the time without a verification."""


def _transformers(kind: str, head: str, **sizes: Any) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        import torch
        import transformers

        torch.manual_seed(0)
        dtype = sizes.pop("dtype", torch.float32)
        model = getattr(transformers, head)(getattr(transformers, f"{kind}Config")(**sizes))
        model.to(dtype).save_pretrained(folder)
        return [str(folder)]

    return make


def _timm(name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        import timm
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        folder.mkdir()
        save_file(timm.create_model(name).state_dict(), folder / "model.safetensors")
        return [str(folder / "model.safetensors"), "--arch", f"timm:{name}"]

    return make


WHISPER = {
    "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
}  # fmt: skip
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
SHAPES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "gpt2-124m": ("rmsnorm", _transformers("GPT2", "GPT2LMHeadModel")),
    "resnet50": ("fuse-bn", _timm("resnet50")),
    "densenet121": ("fuse-bn", _timm("densenet121")),
    "vit-b16": ("rmsnorm", _timm("vit_base_patch16_224")),
    "whisper-base": ("rmsnorm", _transformers("Whisper", "WhisperForConditionalGeneration", **WHISPER)),
    "neox-1b": ("rmsnorm", _transformers("GPTNeoX", "GPTNeoXForCausalLM", **LARGE)),
}
"""Name -> conversion, and what makes the checkpoint and says how it is named on the command line."""
WAYS = {"no": ["--no-verify"], **{level: ["--verify", level] for level in ("quick", "standard", "thorough")}}


def runs(name: str, ways: list[str], repeats: int) -> dict[str, list[Run]]:
    """Each way's runs on one checkpoint, in turns, so that what else the machine does meets all alike."""
    method, make = SHAPES[name]
    found: dict[str, list[Run]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as temporary:
        source = make(Path(temporary) / "source")
        for _ in range(repeats):
            for way in ways:
                out = Path(temporary) / "out"
                options = WAYS["standard"] if way == "busy" else WAYS[way]
                command = [sys.executable, "-m", "normconvert", method, source[0], str(out), *source[1:], *options]
                with _spinning() if way == "busy" else nullcontext():
                    found[way].append(measure(command, out))
    return found


@contextmanager
def _spinning() -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def busy_section(results: dict[str, dict[str, list[Run]]]) -> str:
    """The section of the page on a machine that something else keeps busy."""
    rows = []
    for name, found in results.items():
        idle, busy = ([run.seconds for run in found[way]] for way in ("standard", "busy"))
        rows.append(
            f"| {name} | {median(idle):.1f} | {median(busy):.1f} ({min(busy):.1f} – {max(busy):.1f}) | "
            f"{median(busy) / median(idle):.2f} |"
        )
    return "\n".join(
        [
            "## Verified conversions on a busy machine", "",
            "Written by `python -m tools.benchmarks.verified --busy --write`: whole commands, verified as `standard`, "
            "idle and beside a process that never rests, in turns on 2 cores; medians, seconds. Allowed: 1.6 ×.", "",
            "| checkpoint | idle | beside a busy process | ÷ idle |",
            "| --- | ---: | ---: | ---: |", *rows, "",
        ]
    )  # fmt: skip


def section(results: dict[str, dict[str, list[Run]]]) -> str:
    """The section of the page."""
    rows = []
    for name, found in results.items():
        base = median(run.seconds for run in found["no"])
        for way, own in found.items():
            seconds = median(run.seconds for run in own)
            rows.append(
                f"| {name} | {way} | {seconds:.1f} | {seconds / base:.2f} | "
                f"{median(run.processor for run in own):.1f} | {max(run.gigabytes for run in own):.2f} |"
            )
    return "\n".join(
        [
            "## What the verification costs", "",
            "Written by `python -m tools.benchmarks.verified --write`: whole commands side by side, medians.", "",
            "| checkpoint | verified | seconds | ÷ not verified | processor s | peak GB |",
            "| --- | --- | ---: | ---: | ---: | ---: |", *rows, "",
        ]
    )  # fmt: skip


def main() -> int:
    """Measure; exit status 1 if `standard` takes more than its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["no", "quick", "standard"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else [n for n in SHAPES if n in TARGETS or arguments.large]
    ways = ["standard", "busy"] if arguments.busy else list(dict.fromkeys(["no", *arguments.ways]))
    make_section = busy_section if arguments.busy else section
    results = {}
    for name in names:
        results[name] = runs(name, ways, arguments.repeats)
        print(make_section({name: results[name]}), flush=True)
    if arguments.write:
        from tools.benchmarks.models import SECTIONS
        from tools.docs.pages import write_section

        key = "verified-busy" if arguments.busy else "verified"
        write_section(DOCS / "performance.md", key, make_section(results), SECTIONS)
    if arguments.busy:
        return 0
    late = [
        name
        for name, found in results.items()
        if name in TARGETS
        and "standard" in found
        and median(r.seconds for r in found["standard"]) > TARGETS[name] * median(r.seconds for r in found["no"])
    ]
    print(f"more than the target: {', '.join(late)}" if late else "all within their targets")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
