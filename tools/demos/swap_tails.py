"""The worst losses of the fused models beside the originals', for tools/demos/swap_demos.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import normconvert
from normconvert.sources import open_source
from normconvert.tuning.data import open_data, wanted_by
from normconvert.tuning.data.adversarial import adversarial
from normconvert.tuning.processes import Processes
from normconvert.tuning.tails import SHARES, tails_of

Row = dict[str, Any]


def measure(model: str, source: str, method: str, out: Path, settings: dict[str, Any]) -> Row:
    """The tails of the fused model in ``out``, as JSON-ready data; ``settings`` are those of its swap."""
    opened = open_source(source)
    teacher, wanted = opened.load(), wanted_by(opened, opened.skeleton())
    length = settings.get("length")
    learnt = open_data(settings["data"], wanted, teacher, length=length)
    measured = open_data(settings.get("eval_data", settings["data"]), wanted, teacher, length=length, held_out=True)
    sets = {"held-out data": measured, **{data.name: data for data in adversarial(wanted, learnt, measured)}}
    tails, notes = tails_of(normconvert.load(out), teacher, sets, Processes())
    told = [tail.to_json() for tail in tails]
    row = {"model": model, "name": method, "tails": told, "notes": list(notes)}
    print(json.dumps(row), flush=True)
    return row


def lines(rows: Sequence[Row]) -> list[str]:
    """The section of docs/swap.md."""
    if not rows:
        return []
    text = [
        "",
        "## The worst losses",
        "",
        "Losses in nats per token (language models) or per image, original → fused: the loss that half of all, 99 % "
        "and 99.9 % of them do not exceed, and the largest. In the last column the most that one of the latter three "
        "has grown, which is what `--guard-tails` limits. Odd images have no class: their loss is that of the "
        "original's own decision.",
        "",
        f"| model | method | data | losses | {' | '.join(SHARES)} | worst ratio |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in SHARES)} | --- |",
    ]
    for row in rows:
        for tail in row["tails"]:
            cells = [f"{_shown(tail['original'][share])} → {_shown(tail['swapped'][share])}" for share in SHARES]
            worst = max(math.inf if x is None else x for x in tail["ratio"].values())
            text.append(
                f"| {row['model']} | {row['name']} | {tail['data']} | {tail['losses']} | {' | '.join(cells)} "
                f"| {worst:.2f} |"
            )
    return [*text, "", FOUND]


FOUND = (
    "On text like that learnt from, the tails are the original's to a few per cent. On text that is not, the fused "
    "Llama is up to two and a half times as wrong as the original, most of all without any norm (`ln-free`), least "
    "with `un`: an output that will meet such text should be swapped on some of it, and `--guard-tails` says when it "
    "was not."
)


def _shown(loss: float | None) -> str:
    return "∞" if loss is None else f"{loss:.3g}"
