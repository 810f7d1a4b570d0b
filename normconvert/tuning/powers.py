"""The powers of two by which streams fit into float16, measured on probes and on the user's data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.scalable import Search, search_scale
from normconvert.rewrites.scaling import plan_scale, watched
from normconvert.tracing.graph import Graph
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.verification.stream_sizes import Sizes, measure_streams

if TYPE_CHECKING:
    from normconvert.sources import Source

LARGEST = torch.finfo(torch.float16).max
EXAMPLES = 64
"""Of the user's data."""
BATCH = 4


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


def measured_powers(source: Source, graph: Graph, options: Options, device: str = "cpu") -> Powers:
    """The powers that leave ``options.headroom`` between the largest value of each stream and float16's.

    Streams whose norms share an eps of the config take one power, if the config can say that of all its norms.

    Args:
        source: its model is loaded in float32, and run.
        graph: of the model.
        options: of the conversion.
        device: where it runs.

    Raises:
        InputError: the data cannot be read, or the model not be run.
    """
    search = search_scale(graph, options)
    places = watched(search)
    norms = {
        path: (int(group[0].module["axis"]), group[0].centred)
        for path, group in search.calls.items()
        if group[0].module is not None and search.reads(group[0])
    }
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    model = source.load(dtype=wide, device=device)
    probes = [p for p in verification_inputs(source.skeleton(), tokenizer=source.tokenizer()) if p.realistic]
    probes += _examples(source, options.data) if options.data is not None else []
    sizes = measure_streams(model, probes, places, norms)
    del model
    own = {name: power_for(sizes.largest.get(name, 0.0), options.headroom) for name in places}
    plan, power = _planned(graph, options, own)
    return Powers(power, (*_in_words(sizes), *_unstated(sizes, plan, search)), any(own.values()))


def power_for(largest: float, headroom: float) -> int:
    """The smallest k, not below zero, for which ``largest`` 2^-k is float16's largest number over ``headroom``."""
    return max(0, math.ceil(math.log2(largest * headroom / LARGEST))) if largest > 0 else 0


def _examples(source: Source, data: str) -> Iterator[Probe]:
    from normconvert.tuning.data.batches import all_batches
    from normconvert.tuning.data.opening import open_data
    from normconvert.tuning.data.wanted import wanted_by

    skeleton = source.skeleton()
    examples = open_data(data, wanted_by(source, skeleton), skeleton)
    for number, batch in enumerate(all_batches(examples, BATCH, EXAMPLES)):
        yield Probe(f"data-{number}", {name: value for name, value in batch.items() if name != "labels"})


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
