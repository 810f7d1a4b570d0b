"""Sections of the HTML report for what is more than one conversion, or none that is lossless: batches and swaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normconvert.plan.conversion_plan import Plan
from normconvert.report.charts import training_chart
from normconvert.report.parts import badge, bars, plan_view, tile
from normconvert.wording.words import human_number, percent

Document = dict[str, Any]
WORTH: dict[str, Callable[[float], str]] = {"accuracy": percent, "perplexity": human_number}
"""Figure of a swap that depends on the labels -> how it is told."""


def swap_section(data: Document) -> dict[str, Any]:
    """Norms that were swapped for others and learnt: not lossless, so what it is worth comes first."""
    original, last = data["figures"]["original"], list(data["figures"].values())[-1]
    fused, chosen = data["fused"], data["settings"]
    tiles = [
        tile("agreement", percent(last["agreement"]), "of the original's decisions"),
        *(tile(name, show(last[name]), f"{show(original[name])} the original") for name, show in WORTH.items()
          if last[name] is not None),
    ]  # fmt: skip
    if fused:
        tiles.append(tile("fused", f"{fused['algebra']:.2g}", "off the unfused, float64", "good"))
    charts = [chart for chart in (training_chart(data["trace"]),) if chart is not None]
    swapped, left = (len(data["norms"][key]) for key in ("swapped", "left"))
    return {
        "heading": f"{data['source']} → {data['out']}",
        "about": f"{data['architecture']} · {data['library']} · {data['method']}, measured on {data['eval_data']}",
        "badge": ("plain", "not lossless"),
        "tiles": tiles,
        "table": ("What it is worth", *_stages(data["figures"])),
        "tails": _tails(data["tails"]),
        **plan_view(Plan.from_json(data["plan"]), data["architecture"]),
        "charts": charts,
        "work": [
            ("norms", f"{swapped} swapped, {left} left to run"),
            ("learnt from", f"{chosen['data']}, {data['steps']} steps"),
        ],
        "seconds": bars(data["seconds"]),
        "notes": data["notes"],
    }  # fmt: skip


def _stages(figures: dict[str, Document]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The table of what each stage of a swap is worth: heads, and a row for each stage."""
    shown = {"agreement": percent, **WORTH, "kl": human_number}
    shown = {key: show for key, show in shown.items() if any(one[key] is not None for one in figures.values())}
    rows = [
        (stage, *("–" if one[key] is None else show(one[key]) for key, show in shown.items()))
        for stage, one in figures.items()
    ]
    return [{"kl": "KL (nats)"}.get(key, key) for key in shown], rows


def _tails(tails: list[Document]) -> tuple[str, list[str], list[tuple[str, ...]]] | None:
    """The table of the worst losses, the original's and those of the swapped model; None if there are none."""
    if not tails:
        return None
    shares = list(tails[0]["original"])
    rows = [
        (
            f"{tail['data']}, {tail['unit']}",
            *(f"{_loss(tail['original'][s])} → {_loss(tail['swapped'][s])}" for s in shares),
        )
        for tail in tails
    ]
    return "Worst losses, original → swapped", shares, rows


def _loss(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def batch_section(data: Document) -> dict[str, Any]:
    """The jobs of a batch, what became of each and why."""
    counts, jobs = data["counts"], data["jobs"]
    states = {"converted": "good", "skipped": "", "failed": "bad", "interrupted": "warn"}
    tiles = [tile(name, str(counts[name]), "", states.get(name, "")) for name in counts if counts[name]]
    failed = [f"{job['name']} {job['variant']}: {job['result']['message']}" for job in jobs if _failed(job)]
    return {
        "heading": f"{len(jobs)} conversions",
        "about": ", ".join(dict.fromkeys(job["recipe"].rsplit(":", 2)[0] for job in jobs)),
        "badge": ("plain", "nothing written") if data["dry_run"] else badge(data["exit_status"] == 0, ""),
        "tiles": tiles,
        "reasons": failed,
        "table": ("Jobs", ["norms", "algebra", "rounding", "top-1", "time"], [_job(job) for job in jobs]),
    }


def _failed(job: Document) -> bool:
    return job["result"] is not None and job["result"]["status"] == "failed"


def _job(job: Document) -> tuple[str, ...]:
    label, result = f"{job['name']} {job['variant']}", job["result"]
    if result is None:
        return (label, job["action"], "", "", "", "")
    figures, norms = result["figures"], result["norms"]
    return (
        label,
        f"{norms[0]} of {norms[1]}" if norms else result["status"],
        f"{figures['algebra']:.2g}" if figures.get("algebra") is not None else "–",
        f"{figures['rounding']:.3g} ×" if figures.get("rounding") is not None else "–",
        percent(figures["top1"]) if figures.get("top1") is not None else "–",
        f"{result['seconds']:.1f} s" if result["status"] == "converted" else result["status"],
    )
