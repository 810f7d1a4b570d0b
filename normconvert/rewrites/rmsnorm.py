"""LayerNorm -> RMSNorm without changing what the model computes.

LN(x) = w * Px / sqrt(|Px|^2/d + eps) + b, P = I - 11'/d. On a mean-free value Px = x, so LN(x) is
RMSNorm(x) = w * x / sqrt(|x|^2/d + eps) + b with the same w, b and eps. A stream that is read through P only may have
its mean removed, and it is removed by centring what writes into it (arXiv 2305.14858, section 3, eq. 5-8).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from ..norms import Norm, find_norms, is_float32_cast
from ..options import Options
from ..plan import Plan, Verdict
from ..streams import Analysis, Leak, Spot, Stream, operation
from ..tracing import Graph, module_path
from ..writes import MARK
from .centring import Centring, MarkKey, axis_of, centre_streams, leaks_of, root_of_taint
from .fold import fold_norms

Edits = dict[str, list[dict[str, Any]]]


def plan_rmsnorm(graph: Graph, options: Options) -> Plan:
    """The plan that turns every LayerNorm which provably reads a mean-free value into RMSNorm.

    Every norm gets a verdict. Nothing is converted unless all calls of its module can be.
    """
    norms = find_norms(graph)
    analysis = Analysis(graph, norms)
    centring = centre_streams(analysis, options)
    where = {norm: (stream, spot) for stream in analysis.streams for norm, spot in stream.norms}
    calls: dict[str, list[Norm]] = defaultdict(list)
    for norm in norms:
        calls[norm.path].append(norm)
    verdicts = [_verdict(path, group, where, analysis, centring, options) for path, group in calls.items()]
    verdicts += _never_called(graph, set(calls))
    converted = [norm for v in verdicts if v.converted for norm in calls[v.path]]
    needed, inserted, float32 = _needed(converted, where, centring)
    tensors, aliases, config, notes = _tensor_edits(analysis, centring, needed)
    if options.fold:
        notes += fold_norms(analysis, [calls[v.path] for v in verdicts if v.converted], tensors)
    modules: list[dict[str, Any]] = [
        {"op": "center", "path": path, "side": side, "key": key, "axis": axis}
        for (path, side, key), axis in inserted.items()
    ]
    modules += [_replacement(calls[v.path][0], tensors) for v in verdicts if v.converted]
    return Plan(
        method="rmsnorm",
        tensors=tensors,
        aliases=aliases,
        modules=modules,
        config=config,
        verdicts=verdicts,
        notes=notes + _notes(analysis, converted, where, options, float32),
        float32_norms=float32,
    )


def _replacement(norm: Norm, tensors: Edits) -> dict[str, Any]:
    """The row that puts an RMSNorm in the norm's place; ``folded`` if its parameters have become ones and zeros."""
    row = dict(norm.module or {}, mean_free=True)
    own = [f"{norm.path}.{row[key]}" for key in ("weight", "bias") if row[key]]
    if own and all(tensors.get(name, [{}])[0].get("op") == "fill" for name in own):
        row["folded"] = True
    return row


def _verdict(
    path: str,
    group: list[Norm],
    where: dict[Norm, tuple[Stream, Spot]],
    analysis: Analysis,
    centring: Centring,
    options: Options,
) -> Verdict:
    kind = group[0].kind
    for norm in group:
        if norm.module is None:
            return Verdict(path, kind, False, f"{norm.obstacle}.", "not-a-module")
        stream, spot = where.get(norm, (None, None))
        if stream is None or spot is None:
            return Verdict(path, kind, False, "nothing that the model returns depends on it.", "unused")
        leaks = leaks_of(stream, options)
        if leaks:
            code, reason = _explain_leak(leaks, stream)
            return Verdict(path, kind, False, reason, code)
        if spot not in centring.clean:
            root = root_of_taint(stream, centring, spot)
            return Verdict(path, kind, False, f"what it reads is not mean-free: it contains {root}.", "not-mean-free")
    if reader := _reader_outside(path, group, analysis.graph):
        return Verdict(path, kind, False, f"{reader}, past the calls of the module.", "not-a-module")
    if any(norm.module != group[0].module for norm in group):
        return Verdict(path, kind, False, "it is called in different ways.", "not-a-module")
    return Verdict(path, kind, True, "it reads a mean-free stream that nothing but norms reads.", "converted")


def _never_called(graph: Graph, called: set[str]) -> list[Verdict]:
    """Verdicts for the LayerNorms that no traced call runs."""
    found: dict[int, Verdict] = {}
    for path, module in graph.modules.items():
        if isinstance(module, nn.LayerNorm) and path not in called and id(module) not in found:
            found[id(module)] = Verdict(
                path, type(module).__name__, False, "no traced input makes the model run it.", "unreached"
            )
    seen = {id(graph.modules[path]) for path in called if path in graph.modules}
    return [verdict for key, verdict in found.items() if key not in seen]


def _reader_outside(path: str, group: list[Norm], graph: Graph) -> str:
    """Who uses the module or its parameters in another way than by calling the norm; empty if nobody does."""
    calls = [n for n in graph.nodes if n.target is MARK and n.args[1:4] == (path, "output", "")]
    if len(calls) != len(group):
        return f"`{path}` does something else in {len(calls) - len(group)} of its calls"
    names = {f"{path}.{leaf}" for key in ("weight", "bias") if (leaf := (group[0].module or {}).get(key))}
    for node, parameter in graph.parameters.items():
        if names & set(parameter.aliases):
            outside = next((u for u in node.users if module_path(u) != path), None)
            if outside is not None:
                return f"{operation(outside)} uses `{parameter.name}`"
    return ""


def _explain_leak(leaks: list[Leak], stream: Stream) -> tuple[str, str]:
    """The most telling leak, in words."""
    returned = [leak for leak in leaks if leak.code == "returned"]
    others = [leak for leak in leaks if leak.code != "returned"]
    for leak in others:
        if leak.code == "linear" and _from_norm(leak.spot, stream):
            return "post-norm", f"{operation(leak.reader)} reads the normalised stream directly (Post-LN)."
    if others:
        leak = others[0]
        maker = f"in `{module_path(leak.spot[0])}`" if module_path(leak.spot[0]) else "in the model"
        rest = len(others) - 1
        more = f" (and {rest} more reader{'s' if rest > 1 else ''})" if rest else ""
        return leak.code, f"the stream ({maker}) is not read by norms alone: {leak.reason}{more}."
    leak = returned[0]
    if _from_norm(leak.spot, stream):
        return "post-norm", f"its stream is the normalised value itself, and {leak.reason} (Post-LN)."
    return "returned", f"{leak.reason}, with its mean; --allow-shifted-outputs lets that mean change."


def _from_norm(spot: Spot, stream: Stream) -> bool:
    """Whether the value at ``spot`` is a norm's output, moved or cast."""
    while True:
        made = stream.members.get(spot)
        if made is None or made.how == "opaque":
            return made is not None and made.reason.startswith("the output of the norm")
        if made.how != "sum" or len(made.parts) != 1:
            return False
        spot = made.parts[0]


def _needed(
    converted: list[Norm], where: dict[Norm, tuple[Stream, Spot]], centring: Centring
) -> tuple[set[Spot], dict[MarkKey, int], bool]:
    """What the converted norms rest on.

    Returns:
        Tensors and layer scales to edit; the centring operations, with their axis; whether there is a cast to float32.
    """
    inserted = set(centring.inserted)
    needed: set[Spot] = set()
    used: dict[MarkKey, int] = {}
    seen: set[Spot] = set()
    float32 = any(norm.float32 for norm in converted)
    for norm in converted:
        stream, spot = where[norm]
        work = [spot]
        while work:
            at = work.pop()
            if at in seen:
                continue
            seen.add(at)
            float32 = float32 or is_float32_cast(at[0])
            made, node = stream.members[at], at[0]
            key = tuple(node.args[1:4]) if node.op == "call_function" and len(node.args) == 4 else None
            if key in inserted and "mark" in str(node.target):
                used[key] = axis_of(at)
            elif made.how == "sum":
                work += made.parts
            else:
                needed.add(at)
    return needed, {key: used[key] for key in centring.inserted if key in used}, float32


def _tensor_edits(
    analysis: Analysis, centring: Centring, needed: set[Spot]
) -> tuple[Edits, dict[str, list[str]], dict[str, Any], list[str]]:
    tensors: Edits = {}
    aliases: dict[str, list[str]] = {}
    config: dict[str, Any] = {}
    notes: list[str] = []

    def edit(spot: Spot, name: str, **row: Any) -> None:
        rows = tensors.setdefault(name, [])
        if row not in rows:
            rows.append(row)
        names = analysis.graph.parameters[spot[0]].aliases
        if len(names) > 1 and spot not in centring.untied:
            aliases[name] = list(names)

    def axis(spot: Spot) -> dict[str, Any]:
        place = spot[1]
        row: dict[str, Any] = {"axis": place.dim}
        if not place.whole:
            row |= {"outer": int(place.outer), "inner": int(place.inner)}
        return row

    for spot in (s for s in centring.scales if s in needed):
        scale = centring.scales[spot]
        by = analysis.graph.parameters[scale.factor[0]].name
        for writer in scale.writers:
            name = analysis.graph.parameters[writer[0]].name
            edit(writer, name, op="scale", by=by, **axis(writer))
            edit(writer, name, op="center", **axis(writer))
        edit(scale.factor, by, op="fill", value=1.0)
    for spot in (s for stream in centring.usable for s in stream.members if s in needed):
        if spot in centring.untied:
            parameter = analysis.graph.parameters[spot[0]]
            table = next(u for u in spot[0].users if "embedding" in str(u.target))
            own = f"{module_path(table)}.weight"
            other = next(n for n in parameter.aliases if n != own)
            tensors[other] = [{"op": "copy", "from": own}]
            edit(spot, own, op="center", **axis(spot))
            config["tie_word_embeddings"] = False
            notes.append(f"`{own}` and `{other}` are no longer tied: the output has one table more.")
        elif spot in centring.editable:
            edit(spot, analysis.graph.parameters[spot[0]].name, op="center", **axis(spot))
    return tensors, aliases, config, notes


def _notes(
    analysis: Analysis, converted: list[Norm], where: dict[Norm, tuple[Stream, Spot]], options: Options, float32: bool
) -> list[str]:
    notes = []
    streams = {id(where[n][0]): where[n][0] for n in converted}
    if options.allow_shifted_outputs:
        returned = [leak for s in streams.values() for leak in s.leaks if leak.code == "returned"]
        names = [n for leak in returned for n in analysis.graph.outputs.get(leak.spot[0], ())]
        if names:
            notes.append("shifted outputs: " + ", ".join(dict.fromkeys(names)))
    if float32:
        notes.append(
            "the model casts to float32 on the way to its norms, so float32's rounding limits the algebra's test"
        )
    return notes
