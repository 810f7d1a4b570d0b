"""LayerNorm -> RMSNorm without changing what the model computes.

LN(x) = w * Px / sqrt(|Px|^2/d + eps) + b, P = I - 11'/d. On a mean-free value Px = x, so LN(x) is
RMSNorm(x) = w * x / sqrt(|x|^2/d + eps) + b with the same w, b and eps. A stream that is read through P only may have
its mean removed, and it is removed by centring what writes into it (arXiv 2305.14858, section 3, eq. 5-8).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from normconvert.analysis.norms import Norm, by_path, find_norms, is_float32_cast
from normconvert.analysis.streams import Analysis, AxisRef, Stream
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.centring import Centring, axis_of, doors_of, insertion, root_of_taint
from normconvert.rewrites.fold import fold_norms
from normconvert.rewrites.folding import CASTS
from normconvert.rewrites.insertion import centre_streams
from normconvert.rewrites.registry import rewrite
from normconvert.rewrites.verdicts import misuse, never_called, obstacle
from normconvert.rewrites.writers import Edits, writer_edits
from normconvert.tracing.exits import exit_module
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import Boundary, boundary_of


@rewrite("rmsnorm", compared="verification")
def plan_rmsnorm(graph: Graph, options: Options) -> Plan:
    """The plan that turns every LayerNorm which provably reads a mean-free value into RMSNorm.

    Every norm gets a verdict. Nothing is converted unless all calls of its module can be.
    """
    options = options.for_method("rmsnorm")
    norms = find_norms(graph)
    analysis = Analysis(graph, norms)
    centring = centre_streams(analysis, options)
    where = {norm: (stream, ref) for stream in analysis.streams for norm, ref in stream.norms}
    calls = by_path(norms)
    verdicts = [_verdict(path, group, where, analysis, centring, options) for path, group in calls.items()]
    verdicts += never_called(graph, set(calls))
    converted = [norm for v in verdicts if v.converted for norm in calls[v.path]]
    needed, inserted, float32 = _needed(converted, where, centring)
    tensors, aliases, config, notes = writer_edits(analysis, centring, needed, {"op": "center"})
    if options.fold:
        notes += fold_norms(analysis, [calls[v.path] for v in verdicts if v.converted], tensors)
    modules: list[dict[str, Any]] = [insertion("center", key, axis, centring) for key, axis in inserted.items()]
    modules += [_replacement(calls[v.path][0], tensors) for v in verdicts if v.converted]
    doors = doors_of(graph, needed & centring.given)
    shifted = _shifted_outputs(analysis, converted, where) if options.allow_shifted_outputs else []
    return Plan(
        method="rmsnorm",
        tensors=tensors,
        aliases=aliases,
        modules=modules,
        config=config,
        verdicts=verdicts,
        notes=notes + _notes(shifted, doors, float32),
        float32_norms=float32,
        untraced_doors=doors,
        shifted_doors=shifted_doors(analysis, [s for s in analysis.streams if _moves(s, needed, inserted)]),
        shifted_outputs=shifted,
    )


def _moves(stream: Stream, needed: set[AxisRef], inserted: Collection[Boundary]) -> bool:
    """Whether a stream loses its mean, or a part of it; also of a call that runs no converted norm."""
    return not needed.isdisjoint(stream.members) or any(boundary_of(node) in inserted for node, _ in stream.members)


def shifted_doors(analysis: Analysis, streams: Iterable[Stream]) -> list[dict[str, Any]]:
    """The ways out, other than the model's outputs, that return one of some streams."""
    nodes = dict.fromkeys(leak.ref[0] for s in streams for leak in s.leaks if leak.code == "features")
    rows = [(name, exit_module(node)) for node in nodes for name in analysis.graph.exits[node]]
    return [{"door": name, "output": path} for name, path in dict.fromkeys(rows)]


def _replacement(norm: Norm, tensors: Edits) -> dict[str, Any]:
    """The row that puts an RMSNorm in the norm's place; ``folded`` if its parameters have become ones and zeros."""
    # Px = x, so LayerNorm and RMSNorm are one function here, and the runtime may take the faster kernel.
    row = dict(norm.module or {}, mean_free=True)
    own = [f"{norm.path}.{row[key]}" for key in ("weight", "bias") if row[key]]
    if own and all(tensors.get(name, [{}])[0].get("op") == "fill" for name in own):
        row["folded"] = True
    return row


def _verdict(
    path: str,
    group: list[Norm],
    where: dict[Norm, tuple[Stream, AxisRef]],
    analysis: Analysis,
    centring: Centring,
    options: Options,
) -> Verdict:
    kind = group[0].kind
    if found := obstacle(group, where, options):
        return Verdict(path, kind, False, found.reason, found.code)
    for norm in group:
        stream, ref = where[norm]
        if ref not in centring.clean:
            root = root_of_taint(stream, centring, ref)
            return Verdict(path, kind, False, f"what it reads is not mean-free: it contains {root}.", "not-mean-free")
    if found := misuse(path, group, analysis.graph):
        return Verdict(path, kind, False, found.reason, found.code)
    return Verdict(path, kind, True, "it reads a mean-free stream that nothing but norms reads.", "converted")


def _needed(
    converted: list[Norm], where: dict[Norm, tuple[Stream, AxisRef]], centring: Centring
) -> tuple[set[AxisRef], dict[Boundary, int], bool]:
    """What the converted norms rest on.

    Returns:
        Tensors and layer scales to edit; the centring operations, with their axis; whether there is a cast to float32.
    """
    inserted = set(centring.inserted)
    needed: set[AxisRef] = set()
    used: dict[Boundary, int] = {}
    seen: set[AxisRef] = set()
    float32 = any(norm.float32 for norm in converted)
    for norm in converted:
        stream, ref = where[norm]
        work = [ref]
        while work:
            at = work.pop()
            if at in seen:
                continue
            seen.add(at)
            float32 = float32 or is_float32_cast(at[0])
            made, node = stream.members[at], at[0]
            key = boundary_of(node)
            # What is before a centring operation needs no edit for the sake of what is behind it.
            if key is not None and key in inserted:
                used[key] = axis_of(at)
            elif made.kind == "sum":
                work += made.parts
            else:
                needed.add(at)
    # In the order of insertion, not of the walk: a plan is the same every time.
    return needed, {key: used[key] for key in centring.inserted if key in used}, float32


def _shifted_outputs(analysis: Analysis, converted: list[Norm], where: dict[Norm, tuple[Stream, AxisRef]]) -> list[str]:
    """The outputs that are a stream which converted norms read."""
    streams = {id(where[n][0]): where[n][0] for n in converted}
    # A stream's leaks name one value for each who reads several.
    nodes = dict.fromkeys(node for s in streams.values() for node, _ in s.members)
    return list(dict.fromkeys(n for node in nodes for n in analysis.graph.outputs.get(node, ())))


def _notes(shifted: list[str], doors: list[str], float32: bool) -> list[str]:
    notes = [f"shifted outputs: {', '.join(shifted)}"] if shifted else []
    if doors:
        notes.append(f"{', '.join(doors)} must be without their mean, as what the output's own embeddings give is")
    return [*notes, CASTS] if float32 else notes
