"""Which values of the streams can be made mean-free, by which edits, and where a centring operation pays.

Writers are linear, so P(Wx + b) = (PW)x + Pb: a stream is mean-free once every tensor that writes into it is centred
(arXiv 2305.14858, section 3). That may be done to a stream without leaks only, and to a tensor only if all its readers
are such streams. What cannot be centred *taints* what is made of it, until a centring operation cleans it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.analysis.streams import Analysis, AxisRef, Provenance, Stream, operation, spans
from normconvert.options import Options
from normconvert.rewrites.ties import stay_tied
from normconvert.tracing.exits import SIDE as EXIT
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import Boundary, boundary_of, unmarked
from normconvert.tracing.operations import ALIASES, COPIES, EMBEDDING, MOVES, STRETCHES, VIEWS, name_of, readers
from normconvert.tracing.own_hooks import WATCHED


@dataclass(frozen=True)
class Scale:
    """A layer scale that folds into the writers before it: their refs, and the parameter that becomes one."""

    writers: tuple[AxisRef, ...]
    factor: AxisRef


@dataclass
class Centring:
    """The outcome: mean-free refs, tensors to edit, layer scales to fold, centring operations to insert.

    Attributes:
        clean: values that are mean-free, given the edits.
        usable: streams without leaks.
        editable: tensors that may be changed.
        untied: tied tables of which a copy may be changed.
        blocked: tensors that may not, and who reads them.
        scales: layer scales that fold.
        inserted: places of centring operations, in the order of insertion.
        optional: places at an input that holds embeddings from outside, and that a call may leave out.
        given: values from outside that count as mean-free: whoever gives them has to see to that.
    """

    clean: set[AxisRef] = field(default_factory=set)
    usable: list[Stream] = field(default_factory=list)
    editable: set[AxisRef] = field(default_factory=set)
    untied: set[AxisRef] = field(default_factory=set)
    blocked: dict[AxisRef, fx.Node] = field(default_factory=dict)
    scales: dict[AxisRef, Scale] = field(default_factory=dict)
    inserted: list[Boundary] = field(default_factory=list)
    optional: set[Boundary] = field(default_factory=set)
    given: set[AxisRef] = field(default_factory=set)


def allowed_leaks(options: Options) -> set[str]:
    """The codes of leaks that may see a stream change."""
    allowed = {"returned"} if options.allow_shifted_outputs else set()
    return allowed | ({"features"} if not options.keep_features else set())


def leaks_of(stream: Stream, options: Options) -> list[Any]:
    """The leaks that forbid changing the mean of this stream."""
    allowed = allowed_leaks(options)
    return [leak for leak in stream.leaks if leak.code not in allowed]


def editability(analysis: Analysis, options: Options) -> tuple[Centring, dict[Boundary, list[AxisRef]]]:
    """Which streams, tensors and layer scales may be changed, and where an operation may be inserted.

    Returns:
        The outcome so far, without mean-free refs; and for each place at a module's boundary the values there, one
        for each call.
    """
    result = Centring(usable=[s for s in analysis.streams if not leaks_of(s, options)])
    usable = {ref for stream in result.usable for ref in stream.members}
    places: dict[fx.Node, set[ChannelAxis]] = defaultdict(set)
    for node, place in usable:
        places[node].add(place)
    for stream in result.usable:
        for ref, made in stream.members.items():
            if made.kind == "parameter":
                others = list(analysis.other_readers(ref, usable.__contains__))
                if options.native:  # elsewhere a tied table stays as it is, and an operation stands at its output
                    others = [reader for reader in others if not _blind(analysis, reader, ref)]
                # A tensor that carries channels on two axes would need two edits, each of which is seen by what reads
                # the other axis.
                if not others and len(places[ref[0]]) == 1:
                    result.editable.add(ref)
                else:
                    result.blocked[ref] = others[0] if others else ref[0]
                    if options.tied == "untie" and can_untie(analysis, ref, others):
                        result.untied.add(ref)
    products = [(s, m) for stream in result.usable for s, m in stream.members.items() if m.kind == "scale"]
    result.scales = _resolve_scales(analysis, products)
    boundaries = _boundaries(analysis, usable)
    outside = analysis.graph.outside
    result.optional = {key for key, refs in boundaries.items() if all(unmarked(s[0]) in outside for s in refs)}
    if options.native:  # nothing can stand at the inputs of the library's own model
        result.given = {ref for ref in usable if ref[0] in outside}
    return result, boundaries


def doors_of(graph: Graph, refs: Collection[AxisRef]) -> list[str]:
    """The arguments that hold the values from outside among ``refs``."""
    outside: list[fx.Node] = [node for node, _ in refs if node in graph.outside]
    return [door for door in graph.doors if any(node.name.startswith(door) for node in outside)]


def _blind(analysis: Analysis, reader: fx.Node, ref: AxisRef) -> bool:
    """Whether a linear map by a tensor applies to what has no mean itself, as W n = W P n if n = P n.

    That is what a LayerNorm without a weight and a bias gives.
    """
    tensor, place = ref
    if name_of(reader) != "aten.linear" or reader.args[1] is not tensor or place.dim != 1 or not place.whole:
        return False
    value: Any = reader.args[0]
    at: AxisRef = (value, ChannelAxis(len(shape_of(value)) - 1, place.size))
    while (norm := analysis.norm_of(at[0])) is None:
        made = analysis.provenance(at)
        if made.kind != "sum" or made.rest or len(made.parts) != 1:
            return False
        at = made.parts[0]
    settings = norm.module or {"weight": "unknown"}
    return norm.centred and norm.place == at[1] and settings["weight"] is None and settings["bias"] is None


def can_untie(analysis: Analysis, ref: AxisRef, others: list[fx.Node]) -> bool:
    """Whether a tied table can be split in two: embeddings on one side, one linear map on the other.

    Args:
        analysis: the streams.
        ref: the table.
        others: its readers that would see it change; all of them have to be on the side of the linear map.
    """
    parameter = analysis.graph.parameters[ref[0]]
    tables = [u for u in readers(ref[0]) if name_of(u) == EMBEDDING]
    heads = [u for u in readers(ref[0]) if u not in tables]
    looked_up, read = ({f"{module_path(u)}.weight" for u in side} for side in (tables, heads))
    # Dimension 1 is what the embedding writes, along dimension 0 lie the head's results.
    one_of_each = bool(tables) and bool(others) and set(others) <= set(heads) and len(read) == 1 and ref[1].dim == 1
    rest = set(parameter.aliases) - read
    # A graph may hold several calls of the model, and in one of them embeddings may come from outside.
    named = len(rest) == len(parameter.aliases) - 1 and looked_up <= rest
    return one_of_each and named and (len(rest) == 1 or stay_tied(analysis.graph.modules[""], rest))


@dataclass(frozen=True)
class _Call:
    """One product of a layer scale: where, what it multiplies, and the leaves on both sides."""

    ref: AxisRef
    inner: Stream
    writers: frozenset[AxisRef]
    factor: AxisRef


def _resolve_scales(analysis: Analysis, refs: list[tuple[AxisRef, Provenance]]) -> dict[AxisRef, Scale]:
    """gamma * (Wx + b) = (diag(gamma) W) x + gamma b, if nobody else sees Wx + b, W, b or gamma.

    A layer that is called several times has several such products of the same tensors; they fold together or not.
    """
    calls = [call for ref, made in refs if (call := _scale_call(analysis, ref, made)) is not None]
    groups: dict[AxisRef, list[_Call]] = defaultdict(list)
    for call in calls:
        groups[call.factor].append(call)
    found: dict[AxisRef, Scale] = {}
    for factor, group in groups.items():
        inner = {ref for call in group for ref in call.inner.members}
        if len({call.writers for call in group}) != 1:
            continue
        # A norm of parameters alone would not see their mean go, but gamma.
        readers_of = (analysis.other_readers(s, inner.__contains__, norms_too=True) for s in group[0].writers)
        if any(next(others, None) for others in readers_of):
            continue
        # gamma becomes one, so it must have no other readers than the calls that fold.
        if set(readers(factor[0], _REARRANGES)) != {call.ref[0] for call in group}:
            continue
        scale = Scale(tuple(sorted(group[0].writers, key=lambda s: s[0].name)), factor)
        found |= {call.ref: scale for call in group}
    taken: dict[AxisRef, set[AxisRef]] = defaultdict(set)
    for scale in found.values():
        for writer in scale.writers:
            taken[writer].add(scale.factor)
    # A writer that two scales multiply can take neither: each would be seen through the other.
    return {s: scale for s, scale in found.items() if all(len(taken[w]) == 1 for w in scale.writers)}


def _scale_call(analysis: Analysis, ref: AxisRef, made: Provenance) -> _Call | None:
    value, factor = made.parts
    inner = analysis.grow(value)
    # Who else reads Wx + b would see it multiplied by gamma.
    if inner.norms or inner.centred or any(leak.reader is not ref[0] or leak.code != "product" for leak in inner.leaks):
        return None
    # What is no parameter, or a number added to all channels, has nowhere to put gamma.
    if any(m.kind not in ("parameter", "sum") or m.rest for m in inner.members.values()):
        return None
    chain = analysis.grow(factor)  # from the factor back to its parameter
    leaves = [s for s, m in chain.members.items() if m.kind == "parameter"]
    if len(leaves) != 1 or any(m.kind not in ("parameter", "sum") or m.rest for m in chain.members.values()):
        return None
    leaf = leaves[0]
    # A factor with further dimensions differs by token too, and no weight can do that.
    if not (spans(leaf) and all(n == 1 or d == leaf[1].dim for d, n in enumerate(shape_of(leaf[0])))):
        return None
    writers = frozenset(s for s, m in inner.members.items() if m.kind == "parameter")
    return _Call(ref, inner, writers, leaf)


_REARRANGES = COPIES | ALIASES | MOVES | VIEWS | STRETCHES
"""What a factor may go through on its way to a product and still be no other factor."""


def _boundaries(analysis: Analysis, usable: set[AxisRef]) -> dict[Boundary, list[AxisRef]]:
    """Places where a centring operation may stand: at every call the value is a usable stream's, on the same axis."""
    refs: dict[fx.Node, list[ChannelAxis]] = defaultdict(list)
    for node, place in usable:
        refs[node].append(place)
    found: dict[Boundary, list[AxisRef]] = defaultdict(list)
    bad: set[Boundary] = set()
    for node in analysis.graph.nodes:
        key = boundary_of(node)
        if key is None or key[0] in analysis.graph.unmarked or key[1] in (EXIT, WATCHED):
            continue  # a call without its marker would not show what a hook there does
        places = refs[node]
        # One hook serves all calls of a module, so one bad call spoils the place for all.
        if len(places) != 1 or not spans((node, places[0])):
            bad.add(key)
        elif node not in analysis.data and next(analysis.other_readers((node, places[0]), usable.__contains__), None):
            bad.add(key)  # a value of parameters alone, which others read too
        else:
            found[key].append((node, places[0]))
    axes = {key: {axis_of(s) for s in calls} for key, calls in found.items()}
    return {key: calls for key, calls in found.items() if key not in bad and len(axes[key]) == 1}


def insertion(op: str, key: Boundary, axis: int, centring: Centring) -> dict[str, Any]:
    """The module edit of an operation at a place."""
    row = {"op": op, "path": key[0], "side": key[1], "key": key[2], "axis": axis}
    return {**row, "optional": True} if key in centring.optional else row


def axis_of(ref: AxisRef) -> int:
    """The channel dimension counted from the end."""
    return ref[1].dim - len(shape_of(ref[0]))


def leaves_tied_table(marker: fx.Node, result: Centring) -> bool:
    """Whether a marker is the output of the module that looks up a tied embedding."""
    tied = {ref[0] for ref in result.blocked}
    at: Any = marker
    while isinstance(at, fx.Node) and at.op == "call_function" and module_path(at) == marker.args[1]:
        if any(n in tied for n in at.all_input_nodes):
            return bool(marker.args[2] == "output")
        at = at.args[0]
    return False


def root_of_taint(stream: Stream, result: Centring, ref: AxisRef) -> str:
    """Why the value at ``ref`` is not mean-free: the first thing behind it that cannot be centred, in words."""
    while True:
        made = stream.members[ref]
        if made.kind == "parameter":
            reader = result.blocked.get(ref)
            return f"the parameter `{ref[0].name}`, which {operation(reader)} reads too" if reader else "a parameter"
        if made.kind == "scale":
            return f"{operation(ref[0])}, a scale by channel that cannot be folded"
        if made.reason:
            return made.reason
        if made.rest:
            return f"{operation(ref[0])}, {made.rest}"
        # There is one, or the sum were mean-free itself.
        ref = next(part for part in made.parts if part not in result.clean)
