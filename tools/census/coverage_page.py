"""The page that the coverage sweep writes: a section for each conversion, with summary, tables, causes.

A sweep writes its own section and leaves those of the other conversions as they are. This file has what they share and
the section of ``rmsnorm``; ``coverage_fuse_page.py`` has that of ``fuse-bn``, ``coverage_sections.py`` joins them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tools.census.zoo.timm_zoo import timm_table

Row = dict[str, Any]

REASONS = {
    "post-norm": "Post-LN: the stream is the norm's own output and others read it",
    "returned": "the stream is returned with its mean (`--allow-shifted-outputs` converts it)",
    "linear": "a linear map reads the stream beside the norms",
    "not-mean-free": "something that cannot be centred writes into the stream",
    "not-a-module": "no module holds the norm, or its module is used in several ways",
    "unreached": "the traced call does not run it (another modality's tower, or dead code)",
    "unread": "a tensor that no traced call reads could write into the stream",
    "unknown-op": "the analysis does not know an operation on the way",
    "norm-axes": "a norm reads the stream over other axes than its channels",
    "product": "the stream is multiplied channel by channel beside the norms",
    "unused": "nothing that the model returns depends on the norm",
    "cut": "an operation takes the stream's channels apart",
}
"""What the codes of the verdicts mean."""


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


def modules_of_timm(norm: str = "LayerNorm") -> dict[str, str]:
    """Model -> timm module, for the variants of the table."""
    return {name: module for module, names in timm_table(norm).items() for name in names}


def counts(rows: list[Row]) -> dict[str, int]:
    """The figures of one library."""
    found = bearing(rows)
    states = Counter(map(state, found))
    tried = [row["crmsnorm"] for row in found if "crmsnorm" in row]
    crmsnorm = Counter(map(state, tried))
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
        **({f"crmsnorm {word}": crmsnorm[word] for word in ("complete", "partly", "none")} if tried else {}),
        **({"crmsnorm mismatches": crmsnorm["MISMATCH"]} if crmsnorm["MISMATCH"] else {}),
    }


def by_library(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each library."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[row["library"]].append(row)
    return parts


def _complete_modules(rows: list[Row]) -> list[str]:
    modules = modules_of_timm()
    return sorted({modules.get(row["name"], str(row["name"])) for row in rows if is_complete(row)})


def page(rows: list[Row], versions: dict[str, str], left: int = 0) -> str:
    """The whole page in Markdown."""
    parts = by_library(rows)
    lines = [
        "# Coverage",
        "",
        "What `normconvert rmsnorm` does, with its default options, to every model type of transformers that builds "
        "from its default configuration and to at least one variant of every timm module. Each model is made small "
        "(two layers where the configuration allows), its weights are random and perturbed, and what was converted is "
        "compared with the original in float64. *Complete* means that every LayerNorm became RMSNorm and that the "
        "outputs are equal.",
        "",
        *_about_crmsnorm(rows),
        "Made by `python tools/census/coverage.py` with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
        *unfinished(len(rows), left),
        "## Summary",
        "",
    ]
    figures = {library: counts(part) for library, part in parts.items()}
    names = dict.fromkeys(name for f in figures.values() for name in f)
    lines += table(["", *figures], [[name, *(str(f.get(name, 0)) for f in figures.values())] for name in names])
    if "timm" in parts:
        complete = _complete_modules(parts["timm"])
        lines += ["", f"timm modules with a complete model: {len(complete)} ({', '.join(complete)})."]
    found = bearing(rows)
    lines += reason_table(found, REASONS, "## Why norms stay") + mismatches(rows, "## Mismatches")
    lines += amplified(rows, "## Beyond the tolerance by amplified rounding")
    lines += failures(found, "## What could not be traced or verified, by cause")
    for library, part in parts.items():
        lines += ["", f"## {library}", ""] + _models(bearing(part), library)
    lines += _left_out(parts)
    return "\n".join(lines) + "\n"


def _about_crmsnorm(rows: list[Row]) -> list[str]:
    """What the column is, if there is one."""
    if not any("crmsnorm" in row for row in rows):
        return []
    return [
        "The column *crmsnorm* has what `normconvert crmsnorm` does, with its default options, to the models that "
        "`rmsnorm` converts at least in part, verified in the same way. For *partly* it says how many norms.",
        "",
    ]


def unfinished(swept: int, left: int) -> list[str]:
    """What to say of a sweep that was interrupted."""
    if not left:
        return []
    return [f"**The sweep is unfinished:** {swept} of {swept + left} types and models; the rest is missing here.", ""]


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def escape(text: str) -> str:
    """Text for a cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def error_of(row: Row) -> str:
    """The float64 error for a cell."""
    return f"{row['error']:.0e}" if row.get("error") is not None else ""


def _models(rows: list[Row], library: str) -> list[str]:
    modules = modules_of_timm()
    with_crmsnorm = any("crmsnorm" in row for row in rows)
    first = ["module", "model"] if library == "timm" else ["type"]
    body = []
    for row in sorted(rows, key=lambda r: (modules.get(r["name"], ""), r["name"])):
        reasons = ", ".join(f"{code} {n}" for code, n in sorted(row.get("reasons", {}).items()))
        names = [modules.get(row["name"], ""), row["name"]] if library == "timm" else [row["name"]]
        norms, converted = str(row.get("norms", row.get("layernorms", ""))), str(row.get("converted", ""))
        found = [state(row), error_of(row), *([_crmsnorm(row)] if with_crmsnorm else [])]
        body.append([*names, row.get("model_class", ""), norms, converted, *found, reasons])
    heads = ["class", "norms", "converted", "result", "float64 error", *(["crmsnorm"] if with_crmsnorm else [])]
    return table([*first, *heads, "reasons of the rest"], body)


def _crmsnorm(row: Row) -> str:
    """What ``crmsnorm`` does with the model, for a cell; empty if it was not tried."""
    other = row.get("crmsnorm")
    if other is None:
        return ""
    found = state(other)
    return f"{found}, {other['converted']}" if found == "partly" else found


def reason_table(rows: list[Row], meanings: Mapping[str, str], title: str) -> list[str]:
    """Why norms stay: how many for each class of reason, with an example."""
    models: Counter[str] = Counter()
    norms: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in rows:
        for code, n in row.get("reasons", {}).items():
            models[code] += 1
            norms[code] += n
            examples.setdefault(code, f"{row['name']}, {row['examples'][code]}")
    body = [
        [code, meanings.get(code, ""), str(n), str(models[code]), escape(examples[code])]
        for code, n in norms.most_common()
    ]
    return ["", title, "", *table(["code", "meaning", "norms", "models", "an example"], body)]


def mismatches(rows: list[Row], title: str) -> list[str]:
    """Models that do not compute what they did, if there are any."""
    bad = [row for row in rows if row.get("mismatch")]
    if not bad:
        return []
    body = [[row["library"], row["name"], error_of(row), escape("; ".join(row["worst"]))] for row in bad]
    return ["", title, "", *table(["library", "model", "error", "where"], body)]


def amplified(rows: list[Row], title: str) -> list[str]:
    """Models whose random weights amplify rounding beyond the tolerance, whatever is done to them."""
    deep = [row for row in rows if row.get("sensitivity") and row.get("mismatch") is False]
    if not deep:
        return []
    text = (
        "Rounding grows by a factor from layer to layer in a deep network of random weights. In these models the error "
        "is beyond the tolerance, and so is what the *original* does to its own outputs when each weight moves to a "
        "neighbouring float64 number. An error beyond four times that counts as a mismatch."
    )
    body = [[row["library"], row["name"], f"{row['error']:.1e}", f"{row['sensitivity']:.1e}"] for row in deep]
    return ["", title, "", text, "", *table(["library", "model", "error", "original, weights moved"], body)]


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


def failures(rows: list[Row], title: str) -> list[str]:
    """Models that could not be traced or verified, by cause."""
    failed = [row for row in rows if "failure" in row or "unverified" in row]
    if not failed:
        return []
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in failed:
        message = row.get("failure") or row["unverified"]
        cause = str(row.get("cause", "converted, but not verified"))
        groups[cause_of(message) if cause == "trace" else cause].append(row)
    body = [
        [escape(cause), row["library"], row["name"], escape(row.get("failure") or row["unverified"])]
        for cause, members in sorted(groups.items(), key=lambda kv: -len(kv[1]))
        for row in members
    ]
    return ["", title, "", *table(["cause", "library", "model", "message"], body)]


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
            lines.append(f"- {library}: {len(names)} skipped, {escape(reason)}{listed}")
    return lines
