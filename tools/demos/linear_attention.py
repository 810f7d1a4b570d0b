"""What ``normconvert swap sla`` and ``slab`` are worth, whole and without their parts, and their time against tokens.

    python -m tools.demos.linear_attention                 # the section of docs/swap.md, a quarter of an hour
    python -m tools.demos.linear_attention --only tokens   # one part of it; the others stay as they were measured

On the embedded ViT and its digits. Its 17 tokens are too few for linear attention to be faster, so all layers are
named; what there is to gain in time is measured on larger models with random weights (tools/benchmarks/swap_tokens.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import normconvert
from normconvert.wording.words import human_number, percent
from tools.benchmarks import swap_tokens
from tools.docs.pages import write_section

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "swap.md"
RESULTS = ROOT / "docs" / "results" / "linear_attention.json"
SEEDS = (0, 1, 2)
COMMON: dict[str, Any] = {
    "data": "demo:", "batch_size": 64, "attention": ["*"], "batches_between_checkpoints": 0, "overwrite": True,
}  # fmt: skip
STEPS = {"whole": 400, "parts": 200}
ALLOWED = 1.5
"""Points of accuracy that may be lost."""
WITHOUT: dict[str, dict[str, Any]] = {
    "": {},
    ", no convolution": {"convolution": False},
    ", no matching layer by layer": {"matching": 0.0},
    ", softmax gone at once": {"schedule": "none"},
    ", at once and no matching": {"schedule": "none", "matching": 0.0},
}
FOUND = (
    "Of `sla`, learning layer by layer with softmax still in place counts: without it and with the schedule it loses "
    "about a point. The convolution makes no difference beyond the spread of the seeds, and once each layer has learnt "
    "by itself softmax may go at once. Of `slab`, where the norms' change weighs more, no part makes a difference "
    "beyond it. All stay the defaults, as in the paper, since a grid of 4×4 patches says nothing of larger ones. The "
    "paper trains from scratch; what is measured here is what distillation alone reaches."
)
Row = dict[str, Any]


def run(method: str, steps: int, seed: int, folder: Path, **more: Any) -> Row:
    """One swap, as JSON-ready data."""
    start = time.process_time()
    report = normconvert.swap("demo:vit", folder / "out", method, steps=steps, seed=seed, **COMMON, **more)
    before, after = report.figures["original"], report.figures["tuned"]
    return {
        "original": before.accuracy,
        "accuracy": after.accuracy,
        "kl": after.kl,
        "agreement": after.agreement,
        "algebra": report.fused.algebra if report.fused else None,
        "norms": len(report.left),
        "attention": len(report.attention_left),
        "seconds": time.process_time() - start,
    }


def whole(folder: Path) -> list[Row]:
    """Both methods, as a user runs them."""
    return [{"name": method, "runs": [run(method, STEPS["whole"], 0, folder)]} for method in ("sla", "slab")]


def parts(folder: Path) -> list[Row]:
    """Both methods without each of their parts, three seeds each."""
    rows = []
    for method in ("sla", "slab"):
        for name, more in WITHOUT.items():
            runs = [run(method, STEPS["parts"], seed, folder, fuse=False, **more) for seed in SEEDS]
            rows.append({"name": method + name, "runs": runs})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def section(results: dict[str, Any]) -> str:
    """The section of docs/swap.md."""
    text = [
        "## Linear attention",
        "",
        "Written by `python -m tools.demos.linear_attention`. The embedded ViT, accuracy on held-out digits; "
        f"{STEPS['whole']} steps of 64 images, seconds of processor time. {ALLOWED:g} points may be lost.",
        "",
        "| method | original | tuned | agreement | fused − unfused, float64 | norms left | softmax left | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results.get("whole", ()):
        one = row["runs"][0]
        algebra = "–" if one["algebra"] is None else f"{one['algebra']:.1g}"
        text.append(
            f"| {row['name']} | {percent(one['original'])} | {percent(one['accuracy'])} | {percent(one['agreement'])} "
            f"| {algebra} | {one['norms']} | {one['attention']} | {one['seconds']:.0f} |"
        )
    text += [
        "",
        f"Without their parts, {STEPS['parts']} steps: medians of {len(SEEDS)} seeds, worst and best in brackets.",
        "",
        "| method | tuned | KL from the original | agreement |",
        "| --- | --- | --- | --- |",
    ]
    for row in results.get("parts", ()):
        cells = [
            _spread(row, "accuracy", percent),
            _spread(row, "kl", human_number),
            _spread(row, "agreement", percent),
        ]
        text.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*text, "", FOUND, "", *swap_tokens.lines(results.get("tokens", ()))])


def _spread(row: Row, key: str, tell: Any) -> str:
    values = sorted((run[key] for run in row["runs"]), reverse=key == "kl")
    return f"{tell(statistics.median(values))} ({tell(values[0])} … {tell(values[-1])})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("whole", "parts", "tokens")
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="measure these; the others stay")
    options = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            results[name] = (
                swap_tokens.measure() if name == "tokens" else {"whole": whole, "parts": parts}[name](Path(folder))
            )
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_section(PAGE, "attention", section(results), ["attention", "gpu"])
    lost = {r["name"]: 100 * (r["runs"][0]["original"] - r["runs"][0]["accuracy"]) for r in results.get("whole", ())}
    if any(points > ALLOWED for points in lost.values()):
        raise SystemExit(f"beyond the limit of {ALLOWED} points: {lost}")


if __name__ == "__main__":
    main()
