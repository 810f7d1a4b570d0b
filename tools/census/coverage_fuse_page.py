"""The section of the coverage page about ``fuse-bn``: what becomes of every BatchNorm, beside what other tools fuse."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tools.census.coverage_page import (
    amplified,
    by_library,
    error_of,
    escape,
    failures,
    mismatches,
    modules_of_timm,
    reason_table,
    table,
    unfinished,
)

Row = dict[str, Any]

TOOLS = {
    "torch.fx": "`torch.fx.experimental.optimization.fuse`",
    "optimum.fx": "optimum 1.24's `FuseBatchNorm2dInConv2d` and `FuseBatchNorm1dInLinear`",
    "onnxslim": "`torch.onnx.export`, its optimiser, then onnxslim",
}
"""The tools beside ours, in words."""

REASONS = {
    "product": "a non-linearity or a product stands before it, and what reads it cannot take it either",
    "unknown-op": "the analysis does not know an operation on the way",
    "read-elsewhere": "something else reads what the linear map before it makes, and what reads it cannot take it",
    "padding": "the convolution behind it pads with zeros, for which its shift would have to be zero",
    "returned": "the model returns the value",
    "not-a-module": "it is no module of its own",
    "batch-statistics": "it has no running statistics: it is no affine map at inference",
    "shared-weight": "the linear map beside it is used elsewhere, too",
    "input": "it reads an input of the model",
    "no-bias": "the linear map beside it cannot get a bias",
    "tied": "the weight beside it is tied",
    "unreached": "the traced calls do not run it",
    "form": "what it computes is not seen to be an affine map, channel by channel",
    "unproved": "the model without it could not be shown to be the same",
    "cut": "an operation on the way takes the channels apart",
    "axes": "it lies along other axes than the channels of the linear map beside it",
    "not-constant": "its shift cannot pass an operation on the way",
    "computed-weight": "the weight beside it is computed",
}
"""What the codes of the verdicts mean; a code without a row stands for itself."""


def _bearing(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get("batchnorms") or row.get("cause") in ("time", "memory", "sweep")]


def missed(row: Row) -> dict[str, list[str]]:
    """Tool -> BatchNorms that it fuses and that ours leaves."""
    left = set(row.get("left", ()))
    found = {tool: sorted(left & set(other.get("fused", ()))) for tool, other in row.get("others", {}).items()}
    return {tool: paths for tool, paths in found.items() if paths}


def _left_at_last(row: Row) -> list[str]:
    """BatchNorms that stay with ``--merge-branches``, too."""
    left: list[str] = row.get("again", {}).get("left", row.get("left", []))
    return left


def is_incomplete(row: Row) -> bool:
    """Whether another tool fuses what ours leaves, or a BatchNorm is without a verdict."""
    return bool(missed(row) or row.get("without_verdict"))


def _state(row: Row) -> str:
    if "failure" in row:
        return {"trace": "not traced", "plan": "error"}.get(row["cause"], str(row["cause"]))
    if row.get("mismatch") or row.get("again", {}).get("mismatch"):
        return "MISMATCH"
    if "unverified" in row:
        return "unverified"
    if not row.get("converted"):
        return "none"
    if row["left"] and not _left_at_last(row):
        return "complete with merging"
    return "partly" if row["left"] else "complete"


def fuse_counts(rows: list[Row]) -> dict[str, int]:
    """The figures of one library."""
    found = _bearing(rows)
    states = Counter(map(_state, found))
    return {
        "models built": sum("batchnorms" in row for row in rows),
        "with BatchNorm": len(found),
        "traced": sum("taken" in row for row in found),
        "complete (no BatchNorm left)": states["complete"],
        "complete with `--merge-branches`": states["complete with merging"],
        "partly": states["partly"],
        "none": states["none"],
        "unverified": states["unverified"],
        "mismatches": states["MISMATCH"],
        "BatchNorms": sum(row.get("batchnorms", 0) for row in found),
        "BatchNorms fused": sum(len(row.get("taken", ())) for row in found),
        "BatchNorms fused with `--merge-branches`": sum(
            len(row.get("again", row).get("taken", row.get("taken", ()))) for row in found
        ),
        "BatchNorms without a verdict": sum(row.get("without_verdict", 0) for row in found),
        "fused by another tool and left by ours": sum(len(paths) for row in found for paths in missed(row).values()),
    }


def fuse_section(rows: list[Row], versions: dict[str, str], left: int = 0) -> str:
    """The whole section in Markdown."""
    parts = by_library(rows)
    found = _bearing(rows)
    lines = [
        "## BatchNorm: `normconvert fuse-bn`",
        "",
        "What `normconvert fuse-bn` does to every model type of transformers that builds and has BatchNorm-like "
        "modules, and to the smallest variants that have them of every family of every timm module. Each model is made "
        "small, its weights and running statistics are random and perturbed, and what was converted is compared with "
        "the original in float64. *Complete* means that no BatchNorm is left and that the outputs are equal.",
        "",
        "Made by `python tools/census/coverage.py --method fuse-bn` with "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + ".",
        "",
        *unfinished(len(rows), left),
    ]
    figures = {library: fuse_counts(part) for library, part in parts.items()}
    names = list(next(iter(figures.values()), {}))
    lines += table(["", *figures], [[name, *(str(f[name]) for f in figures.values())] for name in names])
    lines += _beside(found)
    lines += reason_table(found, REASONS, "### Why BatchNorms stay") + mismatches(rows, "### BatchNorm mismatches")
    lines += amplified(rows, "### Beyond the tolerance by amplified rounding")
    lines += _missed_table(found)
    lines += failures(found, "### What could not be traced or verified")
    for library, part in parts.items():
        lines += ["", f"### BatchNorm in {library}", ""] + _models(_bearing(part), library)
    return "\n".join(lines) + "\n"


def _beside(rows: list[Row]) -> list[str]:
    """What each tool fuses in the models that it takes, beside ours in the same models, and in all."""
    every, rows = [row for row in rows if "taken" in row], [row for row in rows if row.get("others")]
    lines = ["", "### Beside other tools", ""]
    lines.append(
        f"Run on {len(rows)} of the {len(every)} models above" + ("." if len(rows) == len(every) else ", so far.") + " "
        "In the same models: how many of them a tool takes at all, and what it fuses in those. "
        f"normconvert takes {len(rows)} and fuses {sum(len(r['taken']) for r in rows)} of "
        f"{sum(r['batchnorms'] for r in rows)} BatchNorms."
    )
    body = []
    for tool, words in TOOLS.items():
        taken = [row for row in rows if "fused" in row["others"].get(tool, {})]
        theirs = sum(len(row["others"][tool]["fused"]) for row in taken)
        ours = sum(len(row["taken"]) for row in taken)
        left = sum(len(missed(row).get(tool, ())) for row in taken)
        norms = sum(row["batchnorms"] for row in taken)
        body.append([words, str(len(taken)), str(norms), str(theirs), str(ours), str(left)])
    head = ["tool", "models it takes", "BatchNorms there", "fused by it", "fused by ours", "by it and not by ours"]
    return [*lines, "", *table(head, body)]


def _missed_table(rows: list[Row]) -> list[str]:
    body = [
        [row["library"], row["name"], tool, escape(", ".join(f"`{p}`" for p in paths[:5]))]
        for row in rows
        for tool, paths in missed(row).items()
    ]
    if not body:
        return []
    return ["", "### Fused by another tool and left by ours", "", *table(["library", "model", "tool", "norms"], body)]


def _models(rows: list[Row], library: str) -> list[str]:
    modules = modules_of_timm("BatchNorm")
    first = ["module", "model"] if library == "timm" else ["type"]
    body = []
    for row in sorted(rows, key=lambda r: (modules.get(r["name"], ""), r["name"])):
        reasons = ", ".join(f"{code} {n}" for code, n in sorted(row.get("reasons", {}).items()))
        names = [modules.get(row["name"], ""), row["name"]] if library == "timm" else [row["name"]]
        others = [_count(row.get("others", {}).get(tool, {})) for tool in TOOLS]
        taken = [str(len(r["taken"])) if "taken" in r else "" for r in (row, row.get("again", {}))]
        body.append([*names, str(row.get("batchnorms", "")), *taken, *others, _state(row), error_of(row), reasons])
    head = [*first, "norms", "fused", "merging", *TOOLS, "result", "float64 error", "reasons of the rest"]
    return table(head, body)


def _count(other: Row) -> str:
    """How many a tool fuses; a dash where it does not take the model."""
    return str(len(other["fused"])) if "fused" in other else "–" if "failure" in other else ""
