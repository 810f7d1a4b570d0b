"""The powers of two by which streams fit into float16, measured while the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from normconvert.errors import InputError, NothingToConvert
from normconvert.options import MOST_POWER, Options
from normconvert.plan.conversion_plan import Plan
from normconvert.result import Report
from normconvert.rewrites.planning import plan_graph
from normconvert.rewrites.scalable import Search, search_scale
from normconvert.rewrites.scaling import plan_scale, watched
from normconvert.tracing.graph import Graph
from normconvert.tracing.probes import Probe
from normconvert.verification.outcome import with_report
from normconvert.verification.stream_sizes import Sizes, measure_streams

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Powers:
    """What was measured.

    Attributes:
        power: as ``--power`` takes it.
        notes: sentences for the user.
        needed: whether any stream has to be scaled.
    """

    power: str
    notes: tuple[str, ...]
    needed: bool


def measured_powers(model: nn.Module, graph: Graph, options: Options, probes: Sequence[Probe]) -> Powers:
    """The powers that leave ``options.headroom`` between the largest value of each stream and float16's.

    Streams whose norms share an eps of the config take one power, if the config can say that of all its norms.

    Args:
        model: in float32 or wider; it is run.
        graph: of it.
        options: of the conversion.
        probes: what it is run on.

    Raises:
        InputError: the model cannot be run, or the headroom asks for more than norms bear.
    """
    search = search_scale(graph, options)
    places = watched(search)
    norms = {
        path: (int(group[0].module["axis"]), group[0].centred)
        for path, group in search.calls.items()
        if group[0].module is not None and search.reads(group[0])
    }
    sizes = measure_streams(model, probes, places, norms)
    own = {name: power_for(sizes.largest.get(name, 0.0), options.headroom) for name in places}
    if (most := max(own.values(), default=0)) > MOST_POWER:
        raise InputError(
            f"--headroom {options.headroom:g}: a stream would be divided by 2^{most}, and norms, which square it, bear "
            f"2^{MOST_POWER}: choose a smaller one"
        )
    plan, power = _planned(graph, options, own)
    return Powers(power, (*_in_words(sizes), *_unstated(sizes, plan, search)), any(own.values()))


def with_powers(report: Report, graph: Graph, options: Options, found: Powers) -> Report:
    """The report of a conversion whose powers have been measured, with the plan for them.

    Raises:
        NothingToConvert: all streams fit as they are.
    """
    first = report.plan.notes
    plan = plan_graph(graph, replace(options, power=found.power), report.method)
    notes = tuple(note for note in report.notes if note not in first)
    recorded = {**report.options, "power": found.power}
    report = replace(report, plan=plan, options=recorded, notes=(*notes, *plan.notes, *found.notes))
    if not found.needed:
        told = "; ".join(found.notes)
        raise with_report(NothingToConvert(f"{report.source}: nothing to scale: {told}; see --headroom"), report)
    return report


def power_for(largest: float, headroom: float) -> int:
    """The smallest k, not below zero, for which ``largest`` 2^-k is float16's largest number over ``headroom``."""
    return max(0, math.ceil(math.log2(largest * headroom / LARGEST))) if largest > 0 else 0


def _planned(graph: Graph, options: Options, own: Mapping[str, int]) -> tuple[Plan, str]:
    """The plan, and the powers as text: each stream's own, or one for all where only so the config can say it."""
    together = str(max(own.values(), default=0))
    apart = ",".join(f"{name}={power}" for name, power in own.items())
    plan = plan_scale(graph, replace(options, power=together))
    if len(set(own.values())) < 2 or together == "0":
        return plan, together
    other = plan_scale(graph, replace(options, power=apart))
    stated = [all(row.get("stated") for row in one.modules) for one in (plan, other)]
    return (plan, together) if stated == [True, False] else (other, apart)


def _in_words(sizes: Sizes) -> list[str]:
    """The largest value of all streams; which has it is what a user may want to know."""
    name = max(sizes.largest, key=sizes.largest.__getitem__)
    found = f"the stream that `{name}` reads goes up to {sizes.largest[name]:,.5g}, of {LARGEST:,.0f} in float16"
    return [f"{found} ({sizes.inputs} inputs)"]


def _unstated(sizes: Sizes, plan: Plan, search: Search) -> Iterator[str]:
    """By how much the unmodified class is off, where its config cannot say the new eps."""
    off = 0.0
    for row in plan.modules:
        if not row.get("stated"):
            old = float((search.calls[row["path"]][0].module or {})["eps"])
            square = sizes.smallest.get(row["path"], 0.0)
            # What it reads is scaled, and the old eps is to it what old^2 / new is to the original.
            off = max(off, 1.0 - math.sqrt((square + old) / (square + old * old / row["eps"])))
    if off:
        yield f"with the unmodified class, norms give what is {off:.1g} off at most, on the {sizes.inputs} inputs seen"
