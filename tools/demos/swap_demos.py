"""What swapping the norms of the embedded models, and of a small Llama, costs and gains: docs/swap.md.

    apt-get install bible-kjv                        # the King James text, for gpt2 and llama only
    python tools/demos/swap_demos.py                       # writes docs/swap.md and docs/results/swap.json
    python tools/demos/swap_demos.py --only swaps --models gpt2 --methods un
    python tools/demos/swap_demos.py --only tails speed    # of the models that were made before; wants an idle machine

A run of one part, model or method leaves the other rows as they are. The Llama is trained first (three minutes on one
core), and is kept in build/swap, too; it has swaps only. So is one of twelve blocks, which has ablations only. The
fused models are kept in build/swap, for the
speed to be measured again without a training.
Seeded. Each row is one ``normconvert.swap``; accuracy and perplexity are of data that neither the original nor the swap
has learnt from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: make `tools` importable

import normconvert
from normconvert.tuning.result import SwapReport
from normconvert.wording.words import human_number, percent
from tools.benchmarks import swap_speed
from tools.demos import swap_ablations, swap_tails
from tools.demos.corpus import cut, read_bible
from tools.demos.larger_models import HELD_OUT, WINDOW, deep_llama, small_llama
from tools.docs.pages import sections, write_section

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "swap.md"
RESULTS = ROOT / "docs" / "results" / "swap.json"
METHODS = ("un", "repbn", "powernorm", "ln-free")
PARTS = ("swaps", "tails", "ablations", "speed")
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"steps": 300, "batch_size": 8, "eval_data": "demo:", "batches_between_checkpoints": 0},
    "llama": {"steps": 120, "batch_size": 8, "length": WINDOW, "batches_between_checkpoints": 0},
    "vit": {"steps": 400, "batch_size": 64, "eval_data": "demo:", "batches_between_checkpoints": 0},
}
MODELS = (*SETTINGS, "llama-12")
MADE = {"llama": small_llama, "llama-12": deep_llama}
"""Models that are not embedded -> what trains them."""
HAVE = {"llama": ("swaps", "tails"), "llama-12": ("ablations",)}
"""Parts of the models that do not have them all."""
LIMITS = {
    "vit": {"un": 1.0, "repbn": 1.0, "powernorm": 2.0, "ln-free": 2.0},
    **dict.fromkeys(("gpt2", "llama"), dict.fromkeys(METHODS, 5.0)),
}
"""Points of accuracy that may be lost, or per cent of perplexity that may be gained."""
KEYS = {
    "swaps": ("model", "name"),
    "tails": ("model", "name"),
    "ablations": ("model", "setting", "name"),
    "speed": ("model", "name"),
}
"""What tells the rows of a part apart."""
Row = dict[str, Any]


def worth(report: SwapReport, stage: str) -> str:
    """Accuracy or perplexity."""
    one = report.figures[stage]
    return percent(one.accuracy) if one.accuracy is not None else human_number(one.perplexity)


def loss_of(report: SwapReport) -> float:
    """Points of accuracy lost, or per cent of perplexity gained."""
    before, after = report.figures["original"], report.figures["tuned"]
    if before.accuracy is not None and after.accuracy is not None:
        return 100 * (before.accuracy - after.accuracy)
    assert before.perplexity is not None
    assert after.perplexity is not None
    return 100 * (after.perplexity / before.perplexity - 1)


def measure(model: str, source: str, method: str, settings: dict[str, Any], out: Path) -> Row:
    """One swap, as JSON-ready data; the fused model stays in ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    report = normconvert.swap(source, out, method, overwrite=True, **settings)
    row = {
        "model": model,
        "name": method,
        "original": worth(report, "original"),
        "calibrated": worth(report, "calibrated"),
        "tuned": worth(report, "tuned"),
        "loss": loss_of(report),
        "agreement": report.figures["tuned"].agreement,
        "kl": report.figures["tuned"].kl,
        "features": max(report.figures["tuned"].features.values()),
        "algebra": report.fused.algebra if report.fused else None,
        "left": len(report.left),
        "train_seconds": report.seconds.get("train", 0.0),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(row), flush=True)
    return row


def made(out: Path) -> Path:
    """The folder of a fused model, which must be there."""
    if not out.is_dir():
        raise SystemExit(f"{out}: no model there: make it first with --only swaps")
    return out


def keep(part: str, rows: Sequence[Row], file: Path) -> dict[str, list[Row]]:
    """All rows of all parts: those measured before, and ``rows`` in their places; ``file`` keeps them."""
    found: dict[str, list[Row]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    keyed = {tuple(row[k] for k in KEYS[part]): row for row in [*found.get(part, []), *rows]}
    names = [*METHODS, *swap_ablations.UN, *swap_ablations.OTHERS]

    def place(row: Row) -> tuple[str, int, int]:
        setting = list(swap_ablations.SETTINGS).index(row["setting"]) if "setting" in row else 0
        return row["model"], setting, names.index(row["name"])

    known = [row for row in keyed.values() if row["name"] in names]
    found = {name: found.get(name, []) for name in PARTS} | {part: sorted(known, key=place)}
    parts = [f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in found[name]) + "\n]" for name in PARTS]
    file.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    return found


def page(rows: dict[str, list[Row]]) -> str:
    """docs/swap.md."""
    text = [
        "# Swapped norms, measured",
        "",
        "Made by `python tools/demos/swap_demos.py` "
        f"on {os.cpu_count()} cores, torch {torch.__version__.partition('+')[0]}. "
        "Accuracy (vit) and perplexity (gpt2, llama) are of held-out data. llama, trained for this on gpt2's "
        "text and not embedded, has RMSNorms, a tied head and shared keys.",
        "",
        "| model | method | original | calibrated | tuned | lost | allowed | agreement | fused − unfused, float64 "
        "| norms left | training |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows["swaps"]:
        unit = " points" if row["model"] == "vit" else " %"
        text.append(
            f"| {row['model']} | {row['name']} | {row['original']} | {row['calibrated']} | {row['tuned']} "
            f"| {row['loss']:+.2f}{unit} | {LIMITS[row['model']][row['name']]:.1f}{unit} "
            f"| {percent(row['agreement'])} | {row['algebra']:.1g} | {row['left']} | {row['train_seconds']:.0f} s |"
        )
    told = [f"{m}: {s['steps']} steps of {s['batch_size']} examples" for m, s in SETTINGS.items()]
    text += ["", f"{'; '.join(told)}. The times are those of a machine with other work to do."]
    text += swap_tails.lines(rows["tails"])
    text += [*swap_ablations.lines(rows["ablations"]), *swap_speed.lines(rows["speed"])]
    return "\n".join(text)


def main() -> None:
    """Parse the command line, run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="do these parts (default: all)")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--settings", nargs="+", choices=swap_ablations.SETTINGS, default=swap_ablations.SETTINGS,
                        help="of the ablations (default: all)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="optimiser steps of the swaps, instead of each model's own")
    parser.add_argument("--seconds", type=float, default=swap_speed.SECONDS, help="of timing, a model and method")
    parser.add_argument("--text", type=Path, help="the King James text, one verse a line, instead of Debian's reader")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "swap", help="folder of the fused models")
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    results = RESULTS if options.out == PAGE else options.out.with_suffix(".json")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = {"vit": "demo:", **dict.fromkeys(("gpt2", "llama", "llama-12"), f"text:{folder / 'kjv.txt'}")}
        if {"gpt2", "llama", "llama-12"} & set(options.models) and set(options.only) & {"swaps", "tails", "ablations"}:
            (folder / "kjv.txt").write_text("\n".join(cut(read_bible(options.text)).train), encoding="utf-8")
        for model in options.models:
            parts = set(options.only) & set(HAVE.get(model, PARTS))
            kept = {method: options.kept / f"{model}-{method}" for method in options.methods}
            source = f"demo:{model}"
            if model in MADE and parts:
                source = str(MADE[model](options.kept / model, options.text))
            settings = {"data": data[model], **SETTINGS.get(model, {})}
            if model in MADE:
                settings["eval_data"] = f"text:{source}/{HELD_OUT}"
            if options.steps is not None:
                settings["steps"] = options.steps
            for method, out in kept.items() if "swaps" in parts else ():
                keep("swaps", [measure(model, source, method, settings, out)], results)
            for method, out in kept.items() if "tails" in parts else ():
                keep("tails", [swap_tails.measure(model, source, method, made(out), settings)], results)
            if "ablations" in parts:
                for setting in swap_ablations.settings_of(model, options.settings):
                    where = data[model]
                    if setting == "outliers":
                        where = swap_ablations.outliers(model, where, folder)
                    for name in swap_ablations.SETTINGS[setting]:
                        if name.partition(",")[0] in options.methods:
                            row = swap_ablations.measure(model, source, setting, name, where, folder)
                            keep("ablations", [row], results)
            if "speed" in parts:
                for method, out in kept.items():
                    keep("speed", [swap_speed.measure(model, method, made(out), options.seconds)], results)
    rows = keep("swaps", [], results)
    others = sections(options.out.read_text(encoding="utf-8"))[1] if options.out.exists() else {}
    options.out.write_text(page(rows), encoding="utf-8")
    for name, text in others.items():  # of other tools
        write_section(options.out, name, text, [])
    failed = [row for row in rows["swaps"] if row["loss"] > LIMITS[row["model"]][row["name"]]]
    if failed:
        raise SystemExit("beyond the limit: " + ", ".join(f"{row['model']} {row['name']}" for row in failed))


if __name__ == "__main__":
    main()
