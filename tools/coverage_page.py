"""The page that the coverage sweep writes: summary, tables, causes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from tools.zoo.timm_zoo import timm_table

Row = dict[str, Any]

REASONS = {
    "post-norm": "Post-LN: the stream is the norm's own output and others read it",
    "returned": "the stream is returned with its mean (`--allow-shifted-outputs` converts it)",
    "linear": "a linear map reads the stream beside the norms",
    "not-mean-free": "something that cannot be centred writes into the stream",
    "not-a-module": "no module holds the norm, or its module is used in several ways",
    "unreached": "the traced call does not run it (another modality's tower, or dead code)",
    "unknown-op": "the analysis does not know an operation on the way",
}
"""What the codes of the verdicts mean; a code without a row stands for itself."""


def bearing(rows: Iterable[Row]) -> list[Row]:
    """Rows of models with LayerNorms that could be built."""
    return [row for row in rows if row.get("layernorms") or row.get("cause") in ("time", "memory", "sweep")]


def is_complete(row: Row) -> bool:
    """Every LayerNorm converted, and the result verified."""
    return bool(row.get("norms")) and row["converted"] == row["norms"] and row.get("mismatch") is False


def state(row: Row) -> str:
    """One word for the table."""
    if "failure" in row:
        return {"trace": "not traced", "plan": "error"}.get(row["cause"], str(row["cause"]))
    if row.get("mismatch"):
        return "MISMATCH"
    if "unverified" in row:
        return "unverified"
    if "norms" not in row:
        return "traced"
    if not row["converted"]:
        return "none"
    return "complete" if is_complete(row) else "partly"


def _modules() -> dict[str, str]:
    return {name: module for module, names in timm_table().items() for name in names}


def counts(rows: list[Row]) -> dict[str, int]:
    """The figures of one library."""
    found = bearing(rows)
    states = Counter(map(state, found))
    return {
        "models built": sum("layernorms" in row for row in rows),
        "with LayerNorm": len(found),
        "traced": sum(row.get("cause") not in ("trace", "time", "memory", "sweep") for row in found),
        "complete": states["complete"],
        "partly": states["partly"],
        "none": states["none"],
        "unverified": states["unverified"],
        "mismatches": states["MISMATCH"],
        "norms": sum(row.get("norms", 0) for row in found),
        "norms converted": sum(row.get("converted", 0) for row in found),
    }


def summary(rows: list[Row]) -> str:
    """A few lines for the terminal."""
    lines = []
    for library, part in _by_library(rows).items():
        lines.append(f"{library}: " + ", ".join(f"{v} {k}" for k, v in counts(part).items()))
        if library == "timm":
            lines.append(f"timm: {len(_complete_modules(part))} modules with a complete model")
    return "\n".join(lines)


def _by_library(rows: list[Row]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[row["library"]].append(row)
    return parts


def _complete_modules(rows: list[Row]) -> list[str]:
    modules = _modules()
    return sorted({modules.get(row["name"], str(row["name"])) for row in rows if is_complete(row)})


def page(rows: list[Row], versions: dict[str, str], left: int = 0) -> str:
    """The whole page in Markdown."""
    parts = _by_library(rows)
    lines = [
        "# Coverage",
        "",
        "What `normconvert rmsnorm` does, with its default options, to every model type of transformers that builds "
        "from its default configuration and to at least one variant of every timm module. Each model is made small "
        "(two layers where the configuration allows), its weights are random and perturbed, and what was converted is "
        "compared with the original in float64. *Complete* means that every LayerNorm became RMSNorm and that the "
        "outputs are equal.",
        "",
        "Made by `python tools/coverage.py` with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
        *_unfinished(len(rows), left),
        "## Summary",
        "",
    ]
    figures = {library: counts(part) for library, part in parts.items()}
    names = list(next(iter(figures.values()), {}))
    lines += _table(["", *figures], [[name, *(str(f[name]) for f in figures.values())] for name in names])
    if "timm" in parts:
        complete = _complete_modules(parts["timm"])
        lines += ["", f"timm modules with a complete model: {len(complete)} ({', '.join(complete)})."]
    lines += _reason_table(rows) + _mismatches(rows) + _failures(rows)
    for library, part in parts.items():
        lines += ["", f"## {library}", ""] + _models(bearing(part), library)
    lines += _left_out(parts)
    return "\n".join(lines) + "\n"


def _unfinished(swept: int, left: int) -> list[str]:
    if not left:
        return []
    return [f"**The sweep is unfinished:** {swept} of {swept + left} types and models; the rest is missing here.", ""]


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _error(row: Row) -> str:
    return f"{row['error']:.0e}" if row.get("error") is not None else ""


def _models(rows: list[Row], library: str) -> list[str]:
    modules = _modules()
    first = ["module", "model"] if library == "timm" else ["type"]
    body = []
    for row in sorted(rows, key=lambda r: (modules.get(r["name"], ""), r["name"])):
        reasons = ", ".join(f"{code} {n}" for code, n in sorted(row.get("reasons", {}).items()))
        names = [modules.get(row["name"], ""), row["name"]] if library == "timm" else [row["name"]]
        norms, converted = str(row.get("norms", row.get("layernorms", ""))), str(row.get("converted", ""))
        body.append([*names, row.get("model_class", ""), norms, converted, state(row), _error(row), reasons])
    return _table([*first, "class", "norms", "converted", "result", "float64 error", "reasons of the rest"], body)


def _reason_table(rows: list[Row]) -> list[str]:
    models: Counter[str] = Counter()
    norms: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in bearing(rows):
        for code, n in row.get("reasons", {}).items():
            models[code] += 1
            norms[code] += n
            examples.setdefault(code, f"{row['name']}, {row['examples'][code]}")
    body = [
        [code, REASONS.get(code, ""), str(n), str(models[code]), _escape(examples[code])]
        for code, n in norms.most_common()
    ]
    return ["", "## Why norms stay", "", *_table(["code", "meaning", "norms", "models", "an example"], body)]


def _mismatches(rows: list[Row]) -> list[str]:
    bad = [row for row in rows if row.get("mismatch")]
    if not bad:
        return []
    body = [[row["library"], row["name"], _error(row), _escape("; ".join(row["worst"]))] for row in bad]
    return ["", "## Mismatches", "", *_table(["library", "model", "error", "where"], body)]


CAUSES = {
    "a branch or size depends on values (data-dependent control flow)": r"data.?dependent|unbacked|u0|GuardOn",
    "an operation cannot be traced on the meta device": r"not implemented|NotImplemented|Unsupported|fake|meta",
    "no inputs are known for it": r"no probe|probe|missing .* required|specify|must provide|You have to",
    "the shrunken model does not run": r"shape|size|must match|cannot be multiplied|index .* out of|out of bounds",
}
"""Cause -> what its messages contain; the first that fits."""


def cause_of(message: str) -> str:
    """The class of a tracing failure."""
    return next((cause for cause, words in CAUSES.items() if re.search(words, message, re.IGNORECASE)), "other")


def _failures(rows: list[Row]) -> list[str]:
    failed = [row for row in bearing(rows) if "failure" in row or "unverified" in row]
    if not failed:
        return []
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in failed:
        message = row.get("failure") or row["unverified"]
        cause = str(row.get("cause", "converted, but not verified"))
        groups[cause_of(message) if cause == "trace" else cause].append(row)
    body = [
        [_escape(cause), row["library"], row["name"], _escape(row.get("failure") or row["unverified"])]
        for cause, members in sorted(groups.items(), key=lambda kv: -len(kv[1]))
        for row in members
    ]
    title = "## What could not be traced or verified, by cause"
    return ["", title, "", *_table(["cause", "library", "model", "message"], body)]


def _left_out(parts: dict[str, list[Row]]) -> list[str]:
    lines = ["", "## Left out", ""]
    for library, rows in parts.items():
        without = [row for row in rows if row.get("layernorms") == 0]
        lines.append(f"- {library}: {len(without)} models have no LayerNorm.")
        groups: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if "skipped" in row:
                groups[row["skipped"]].append(row["name"])
        for reason, names in sorted(groups.items(), key=lambda kv: -len(kv[1])):
            listed = f": {', '.join(names)}" if len(names) < 8 else ""
            lines.append(f"- {library}: {len(names)} skipped, {_escape(reason)}{listed}")
    return lines
