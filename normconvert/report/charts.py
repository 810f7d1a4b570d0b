"""What the charts of a report show, as data: labels and series. How they look is the page's business."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from normconvert.benchmark.result import BOUND, CONVERTED, Row

FLOOR = 1e-18
"""Zero has no place on a logarithmic axis; it is drawn here and told as 0."""

Chart = dict[str, Any]


def layer_chart(measures: dict[str, Any]) -> Chart | None:
    """Error per layer: float64 and stored dtype, each with the noise that is there anyway."""
    layers = measures["layers"]
    if not layers:
        return None
    dtype = measures["dtype"]
    names = [layer["name"] for layer in layers]
    series = [
        _series(f"original in {dtype}: the noise floor", layers, "original", "noise"),
        _series(f"converted in {dtype}", layers, "converted", "native"),
        _series("converted in float64", layers, "algebra", "algebra"),
        {"name": "float64's rounding unit", "role": "unit", "values": [sys.float_info.epsilon / 2] * len(layers)},
    ]
    return {
        "title": "Error per layer",
        "about": (
            f"Largest relative error against the original in float64, on the probe {measures['probe']}. "
            "Modules that are changed on purpose, such as centred writers, are left out."
        ),
        "kind": "line",
        "labels": short(names),
        "names": names,
        "series": series,
    }


def norm_chart(measures: dict[str, Any], becomes: str) -> Chart | None:
    """|mean|/rms at each norm's input, before and after; none where no norm is left to read anything."""
    norms = [norm for norm in measures["norms"] if norm["after"] is not None]
    if not norms:
        return None
    names = [norm["path"] for norm in norms]
    return {
        "title": "Mean at each norm",
        "about": (
            f"Largest |mean|/rms over the positions at the norm's input. What becomes {becomes} "
            "may have no mean left but rounding; a norm that stays keeps it."
        ),
        "kind": "line",
        "labels": short(names),
        "names": names,
        "series": [_series("original", norms, "before", "noise"), _series("converted", norms, "after", "native")],
    }


def bench_chart(rows: Sequence[Row]) -> Chart | None:
    """How many times faster than the original each version is, by workload."""
    versions = [(CONVERTED, "native"), (BOUND, "algebra")]
    series = [
        {"name": name, "role": role, "values": [r.speedup[name].median if name in r.speedup else None for r in rows]}
        for name, role in versions
        if any(name in row.speedup for row in rows)
    ]
    if not series:
        return None
    return {
        "title": "Speed",
        "about": (
            "The original's time divided by each version's own; 1 is as fast. The bound is the original without the "
            "norms in question: nothing that only touches norms can be faster."
        ),
        "kind": "bar",
        "labels": [row.name for row in rows],
        "names": [row.name for row in rows],
        "series": series,
    }


def training_chart(trace: Sequence[dict[str, float]]) -> Chart | None:
    """The loss over the steps of a training."""
    if len(trace) < 2:
        return None
    steps = [f"step {point['step']:.0f}" for point in trace]
    return {
        "title": "Training",
        "about": "The loss that is trained on, over the steps. While the old norms fade it may rise.",
        "kind": "line",
        "scale": "linear",
        "labels": [step.removeprefix("step ") for step in steps],
        "names": steps,
        "series": [_series("loss", list(trace), "loss", "native")],
    }


def _series(name: str, rows: Sequence[dict[str, Any]], key: str, role: str) -> dict[str, Any]:
    return {"name": name, "role": role, "values": [_finite(row[key]) for row in rows]}


def _finite(value: Any) -> float | None:
    """A number to draw; what is not finite leaves a gap."""
    number = float(value)
    # So put, NaN is no number to draw either: no comparison with it is true.
    return max(number, FLOOR) if abs(number) < float("inf") else None


def short(names: Sequence[str]) -> list[str]:
    """The names without the components that all dotted ones share at their beginning."""
    dotted = [name.split(".") for name in names if "." in name]
    shared = 0
    # One component is left to each: a name must not vanish.
    while dotted and all(len(p) > shared + 1 and p[shared] == dotted[0][shared] for p in dotted):
        shared += 1
    prefix = ".".join(dotted[0][:shared]) + "." if shared else ""
    return [name.removeprefix(prefix) for name in names]
