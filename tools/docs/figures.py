"""Figures that the README and its kin quote, from where they were measured: ``docs/results`` and pages of docs.

python tools/docs/figures.py     # print them; a test looks for each in the README
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, COVERAGE = ROOT / "docs" / "results", ROOT / "docs" / "coverage.md"
QUANTISATION = ROOT / "docs" / "quantisation.md"


def figures() -> dict[str, str]:
    """What is quoted -> the words that quote it."""
    return {
        "rmsnorm on a CPU": _speeds(_models(), 3),
        "fuse-bn on a CPU": _speeds(_networks("eager"), 2),
        "fuse-bn on a CPU, compiled": _speeds(_networks("compiled"), 2),
        "conversion": _conversion(),
        "what converts": converts(),
        "what a rotation is worth": rotation(),
    }


def converts() -> str:
    """What the census found, in one sentence a conversion."""
    found = {name: _summary(name) for name in ("rmsnorm", "fuse-bn")}
    layer, batch = found["rmsnorm"], found["fuse-bn"]
    whole = [key for key in batch if key.startswith("complete")]
    return (
        f"Of the types of transformers + models of timm with LayerNorm ({_both(layer, 'with LayerNorm')}), `rmsnorm` "
        f"converts {_both(layer, 'complete')} completely, {_both(layer, 'partly')} partly, {_both(layer, 'none')} not "
        f"at all; of those with BatchNorm ({_both(batch, 'with BatchNorm')}), `fuse-bn` frees {_both(batch, *whole)} "
        f"of it, {_both(batch, whole[-1])} of these with `--merge-branches`."
    )


def rotation() -> str:
    """Perplexities of the model whose large channels a rotation spreads, with activations in six bits."""
    text = QUANTISATION.read_text(encoding="utf-8").partition("## SmolLM2")[2]
    head, original, rotated = (
        [cell.strip() for cell in re.findall(rf"^\| {name}\|(.+)\|$", text, re.MULTILINE)[0].split("|")]
        for name in ("", "original ", "rotated ")
    )
    bits, plain = head.index("W16A6"), head.index("float")
    before, after, unrounded = (float(cell.split()[0]) for cell in (original[bits], rotated[bits], original[plain]))
    return f"has a perplexity of {before:.1f}, and rotated of {after:.1f} (not rounded: {unrounded:.1f})"


def _both(rows: dict[str, tuple[int, int]], *keys: str) -> str:
    transformers, timm = (sum(rows[key][i] for key in keys) for i in (0, 1))
    return f"{transformers} + {timm}"


def _summary(section: str) -> dict[str, tuple[int, int]]:
    """The first table of a section of the page: row -> numbers of transformers and timm."""
    text = COVERAGE.read_text(encoding="utf-8").partition(f"<!-- {section} -->")[2]
    rows = re.findall(r"^\| ([\w`() -]+?) \| (\d+) \| (\d+) \|$", text.partition("\n\ntimm modules")[0], re.MULTILINE)
    found: dict[str, tuple[int, int]] = {}
    for name, transformers, timm in rows:
        found.setdefault(name, (int(transformers), int(timm)))
    return found


def _speeds(ratios: list[float], digits: int) -> str:
    return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f} ×"


def _models() -> list[float]:
    rows = [row for kinds in _read("models-cpu")["models"].values() for some in kinds.values() for row in some]
    return [row["speedup"]["converted"]["median"] for row in rows]


def _networks(mode: str) -> list[float]:
    rows = [record["row"] for record in _read("fuse-bn-cpu")["records"]]
    return [row["speedup"]["converted"]["median"] for row in rows if row["mode"] == mode]


def _conversion() -> str:
    data = _read("convert")
    runs = data["ways"]["normconvert"]
    seconds, memory = statistics.median(run["seconds"] for run in runs), max(run["gigabytes"] for run in runs)
    return f"{data['checkpoint']['bytes'] / 1e9:.1f} GB in {seconds:.1f} s with {memory:.2f} GB"


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    for what, said in figures().items():
        print(f"{what}: {said}")
