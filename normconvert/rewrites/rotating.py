"""rotate: the residual streams in another orthogonal basis, without changing what the model computes.

A value x of a stream that norms alone read may be stored as Q x with Q orthogonal: |Q x| = |x|, so RMSNorm gives Q n
where it gave n, and with Q 1 = 1 so does LayerNorm, since Q and P = I - 11'/d commute then. Writers become Q W, and
readers (W diag(g)) Q', once the norm's weight and bias have moved into them (`moved_norms`). Names, shapes and the
library's own class stay. (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406.)

What cannot be written in another basis keeps a stream as it is: a norm's output that is added to it, an activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normconvert.analysis.norms import Norm, by_path, find_norms, is_float32_cast
from normconvert.analysis.streams import Analysis, AxisRef, Provenance, Stream, described, operation
from normconvert.errors import InputError
from normconvert.options import ROTATIONS, Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.plan.given_rotations import TOLERANCE, Given, error_of_ones, given_in, size_of
from normconvert.plan.rotations import order_without_hadamard
from normconvert.rewrites.centring import Centring, allowed_leaks, can_untie, doors_of, editability
from normconvert.rewrites.folding import CASTS
from normconvert.rewrites.inner_calls import with_parts_as_ways_out
from normconvert.rewrites.moved_norms import (
    Moved,
    doors_behind,
    move,
    moved_norm,
    other_outputs,
    shifted_outputs,
    untie,
)
from normconvert.rewrites.normed_tables import NormedTable, normed_tables
from normconvert.rewrites.readers import Returned, Unfoldable
from normconvert.rewrites.registry import rewrite
from normconvert.rewrites.rmsnorm import shifted_doors
from normconvert.rewrites.stream_readers import StreamReaders
from normconvert.rewrites.ties import table_and_head
from normconvert.rewrites.values import Pair, rotate_values, value_pairs
from normconvert.rewrites.verdicts import (
    ALLOWED,
    Obstacle,
    in_a_branch,
    misuse,
    never_called,
    obstacle,
    with_nothing_compared,
)
from normconvert.rewrites.writers import Edits, writer_edits
from normconvert.tracing.graph import Graph


@dataclass
class _Search:
    """Which streams can be rotated.

    Attributes:
        stays: stream, by identity -> why it stays.
        refused: norm -> why it cannot be converted.
        moved: norm -> where its weight and bias go.
        tables: norm that reads rows of a table alone -> the table.
        maps: what reads streams past their norms.
    """

    analysis: Analysis
    found: Centring
    calls: dict[str, list[Norm]]
    where: dict[Norm, tuple[Stream, AxisRef]]
    maps: StreamReaders
    stays: dict[int, Obstacle] = field(default_factory=dict)
    refused: dict[str, Obstacle] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)
    tables: dict[str, NormedTable] = field(default_factory=dict)

    @property
    def streams(self) -> list[Stream]:
        """Those that are not known to stay."""
        return [stream for stream in self.found.usable if id(stream) not in self.stays]


@rewrite("rotate", compared="verification")
def plan_rotate(graph: Graph, options: Options) -> Plan:
    """The plan that rotates every stream which provably allows it, as a whole or not at all.

    Every norm gets a verdict: it is converted if what it reads is rotated.

    Raises:
        InputError: the rotation that is given is of another width than all streams, or moves the mean of a LayerNorm.
    """
    graph = with_parts_as_ways_out(graph)
    given = given_in(options.rotation)
    search = _searched(graph, options, given)
    streams = search.streams
    paths = [path for path, group in search.calls.items() if all(_reads(search, norm, streams) for norm in group)]
    tables = _tables_of(search)
    converted = [norm for path in (*paths, *tables) for norm in search.calls[path]]
    # One map for all streams, since a tensor may write into several.
    constant = any(norm.centred for norm in converted)
    kind = given.kind if given is not None else options.rotation
    change = {"op": "rotate", "kind": kind, "seed": options.seed, "constant": constant}
    if given is not None and constant:
        _refuse_moved_mean(given, next(norm for norm in converted if norm.centred))
    tensors, aliases, config, notes = _edits(search, paths, tables, change)
    moved = {ref for stream in streams for ref in stream.members}
    pairs = value_pairs(search.analysis, moved) if options.values else []
    # A matrix that is given is for the streams; a head has another width.
    own = "hadamard" if given is not None else kind
    rotate_values(search.analysis, pairs, {**change, "kind": own, "constant": False}, tensors)
    verdicts = [_verdict(search, path) for path in search.calls]
    shifted = shifted_outputs(graph, streams, [search.moved[path] for path in paths])
    if shifted and not other_outputs(graph, shifted):
        return with_nothing_compared(plan_rotate(graph, replace(options, allow_shifted_outputs=False)))
    doors = doors_of(graph, moved | _given_to(search, paths, tables))
    float32 = any(n.float32 for n in converted) or any(is_float32_cast(ref[0]) for ref in moved)
    return Plan(
        "rotate",
        tensors=tensors,
        aliases=aliases,
        config=config,
        verdicts=verdicts + never_called(graph, set(search.calls)),
        notes=notes
        + _notes(streams, doors, shifted, options)
        + _notes_of(pairs, options)
        + ([CASTS] if float32 else []),
        float32_norms=float32,
        untraced_doors=doors,
        shifted_doors=_doors_out(search, converted, paths),
        shifted_outputs=shifted,
    )


def _edits(
    search: _Search, paths: list[str], tables: list[str], change: dict[str, Any]
) -> tuple[Edits, dict[str, list[str]], dict[str, Any], list[str]]:
    """The edits of writers, of tables behind norms, and of what reads norms; the rest is as in :func:`writer_edits`."""
    streams, graph = search.streams, search.analysis.graph
    needed = {ref for stream in streams for ref in stream.members}
    found = replace(search.found, usable=streams)
    tensors, aliases, config, notes = writer_edits(search.analysis, found, needed, change)
    for path in tables:
        notes += search.tables[path].move(graph, change, tensors, config)
    # Those whose table writes into a stream that stays.
    notes += untie(graph, _tied(search), (search.moved[path] for path in paths), tensors, config)
    for path in paths:
        move(graph, search.moved[path], tensors, change)
    search.maps.move(streams, tensors, change)
    return tensors, aliases, config, notes


def _given_to(search: _Search, paths: list[str], tables: list[str]) -> set[AxisRef]:
    """Values from outside that are no part of a stream: rows for a norm, and what an earlier call has returned."""
    rows = {ref for path in tables for ref in search.tables[path].outside}
    return rows | {
        ref for path in paths for ref in search.moved[path].values if ref[0] in search.analysis.graph.outside
    }


def _searched(graph: Graph, options: Options, given: Given | None) -> _Search:
    """Find the streams that can be rotated, and all their norms with them.

    Raises:
        InputError: the rotation that is given fits none of them.
    """
    norms = find_norms(graph, uncentred=True)
    analysis = Analysis(graph, norms, mean_only=False)
    analysis.add_written()
    calls = by_path(norms)
    where = {norm: (stream, ref) for stream in analysis.streams for norm, ref in stream.norms}
    # Before linear maps are no leaks any more: what a norm gives of such rows is all that may read them.
    tables = normed_tables(analysis, calls, where)
    maps = StreamReaders(analysis)
    options = replace(options, tied="untie")
    found, _ = editability(analysis, options)
    search = _Search(analysis, found, calls, where, maps, tables=tables)
    for stream in found.usable:
        if why := next((w for ref, made in stream.members.items() if (w := _fixed(search, ref, made))), None):
            search.stays[id(stream)] = why
    if given is not None:
        _leave_other_widths(search, given)
    for path, group in calls.items():
        if why := _unconvertible(search, path, group, options):
            search.refused[path] = why
    # Each round leaves more streams as they are, or is the last.
    while True:
        before = len(search.stays)
        _leave_more(search)
        if len(search.stays) == before:
            return search


def _leave_other_widths(search: _Search, given: Given) -> None:
    """Leave the streams of another width than the matrix of a file.

    Raises:
        InputError: all of them are.
    """
    size, found = size_of(given.kind), sorted({stream.size for stream in search.streams})
    if found and size not in found:
        raise InputError(
            f"{given.name}: holds a matrix of {size} channels, and the streams that can be rotated have "
            f"{' and '.join(map(str, found))}: give a matrix of that width, or leave --rotation out"
        )
    for stream in search.streams:
        if stream.size != size:
            text = f"its stream stays as it is: it has {stream.size} channels, and {given.name} is a matrix of {size}."
            search.stays[id(stream)] = Obstacle("width", text)


def _refuse_moved_mean(given: Given, norm: Norm) -> None:
    """Refuse a rotation that LayerNorms do not commute with.

    Raises:
        InputError: it takes the vector of ones to another.
    """
    if (error := error_of_ones(given.kind)) > TOLERANCE:
        raise InputError(
            f"{given.name}: Q 1 is {error:.2g} from 1, at most {TOLERANCE:.2g}: {described(norm.path)} is a LayerNorm, "
            "and its mean needs a rotation that keeps the vector of ones: give one that does, or leave --rotation out"
        )


def _fixed(search: _Search, ref: AxisRef, made: Provenance) -> Obstacle | None:
    """Why a value of a stream cannot be written in another basis, whatever becomes of the others."""
    norm = _norm_behind(search.analysis, ref)
    if norm is not None and norm.path not in search.tables:
        why = f"the output of the norm {described(norm.path)} is written into it, and takes a number but no rotation"
        return Obstacle("post-norm", f"its stream stays as it is: {why} (post-norm).")
    if made.kind == "opaque" and ref[0] not in search.analysis.graph.outside:
        return Obstacle("opaque", f"its stream stays as it is: it contains {made.reason}.")
    if made.kind == "scale" and ref not in search.found.scales:
        return Obstacle("opaque", f"its stream stays as it is: {operation(ref[0])} scales it channel by channel.")
    if made.kind == "sum" and made.rest:
        return Obstacle("opaque", f"its stream stays as it is: it contains {operation(ref[0])}, {made.rest}.")
    return None


def _norm_behind(analysis: Analysis, ref: AxisRef) -> Norm | None:
    """The norm whose result a value is, scaled by its weight or not."""
    made = analysis.provenance(ref)
    while made.kind == "scale" or (made.kind == "sum" and made.parts and not made.rest):
        # The weight and the bias are the other parts.
        ref = made.parts[0]
        made = analysis.provenance(ref)
    return analysis.norm_of(ref[0])


def _unconvertible(search: _Search, path: str, group: list[Norm], options: Options) -> Obstacle | None:
    """What keeps a norm from being converted; also notes where its weight and bias go."""
    if why := obstacle(group, search.where, options) or misuse(path, group, search.analysis.graph):
        if why.returned:
            return Obstacle("returned", f"{why.returned}, in the basis that it was trained in{ALLOWED}")
        return replace(why, reason=why.reason.replace("with its mean, which", "in its own basis, which"))
    names = {
        search.analysis.graph.parameters[n].name: table_and_head(search.analysis.graph, n)[1] for n in _tables(search)
    }
    at = [search.where[norm][1][1] for norm in group]
    if len({(place.size, place.outer, place.inner) for place in at}) > 1:
        return Obstacle("norm-axes", "its calls read channels at different places.")
    try:
        moved = moved_norm(search.analysis, group, names, through=allowed_leaks(options))
        search.moved[path] = replace(moved, at=at[0])
    except Unfoldable as why:
        more = ALLOWED if isinstance(why, Returned) else "."
        return Obstacle("unfoldable", f"what it gives cannot be in another basis: {why}{more}")
    return None


def _tables(search: _Search) -> list[fx.Node]:
    """The tied tables that can be two tensors."""
    return sorted({node for node, _ in search.found.untied}, key=lambda node: node.name)


def _tied(search: _Search) -> list[tuple[str, str]]:
    """Their names, as the embedding and as the head."""
    return [table_and_head(search.analysis.graph, node) for node in _tables(search)]


def _leave_more(search: _Search) -> None:
    """Leave the streams that cannot be rotated unless others are, which stay."""
    streams = search.streams
    members = {ref for stream in streams for ref in stream.members}
    # A norm is called with streams that are rotated, or with none.
    halfway = {path for path, group in search.calls.items() if not all(_reads(search, norm, streams) for norm in group)}
    for stream in streams:
        for path in dict.fromkeys(norm.path for norm, _ in stream.norms):
            if path in search.refused or path in halfway:
                why = search.refused.get(path) or _why(search, path)
                text = f"its stream stays as it is: the norm {described(path)} reads it, and {why.reason}"
                search.stays.setdefault(id(stream), Obstacle(why.code, text))
        if text := search.maps.obstacle(stream, streams):
            search.stays.setdefault(id(stream), Obstacle("linear", f"its stream stays as it is: {text}."))
        for table in _tables_in(search, stream):
            if text := table.obstacle(search.analysis, stream, members, search.maps.first(stream)):
                path = described(table.calls[0].path)
                text = f"its stream stays as it is: the norm {path} {text}."
                search.stays.setdefault(id(stream), Obstacle("post-norm", text))
        for ref, made in stream.members.items():
            if made.kind != "parameter":
                continue
            others = list(search.analysis.other_readers(ref, members.__contains__))
            fits = ref in search.found.editable and not others
            if not fits and not (ref in search.found.untied and can_untie(search.analysis, ref, others)):
                reader = others[0] if others else search.found.blocked.get(ref, ref[0])
                name = search.analysis.graph.parameters[ref[0]].name
                text = f"its stream stays as it is: `{name}` writes into it, and {operation(reader)} reads that, too."
                search.stays.setdefault(id(stream), Obstacle("shared", text))


def _tables_in(search: _Search, stream: Stream) -> list[NormedTable]:
    """The tables whose rows a norm makes a part of a stream."""
    norms = {norm.path for ref in stream.members if (norm := search.analysis.norm_of(ref[0])) is not None}
    return [table for path, table in search.tables.items() if path in norms]


def _tables_of(search: _Search) -> list[str]:
    """The norms that write rows of a table into streams that are rotated."""
    tables = [table for stream in search.streams for table in _tables_in(search, stream)]
    return list(dict.fromkeys(table.calls[0].path for table in tables))


def _reads(search: _Search, norm: Norm, streams: list[Stream]) -> bool:
    """Whether a norm reads one of the streams."""
    return norm in search.where and any(search.where[norm][0] is stream for stream in streams)


def _why(search: _Search, path: str) -> Obstacle:
    """Why what a norm reads stays."""
    if path in search.refused:
        return search.refused[path]
    streams = [search.where[norm][0] for norm in search.calls[path]]
    return next(search.stays[id(stream)] for stream in streams if id(stream) in search.stays)


def _verdict(search: _Search, path: str) -> Verdict:
    kind, streams = search.calls[path][0].kind, search.streams
    if path in _tables_of(search):
        reason = "the rows of the table that it reads are those for which it gives what it gave, rotated."
        return Verdict(path, kind, True, reason, "converted")
    if all(_reads(search, norm, streams) for norm in search.calls[path]):
        reason = "its stream is rotated, its weight and bias move into the linear maps that read it."
        if search.moved[path].bias_stays:
            reason += " Its bias stays, divided by the weight: one of them has none."
        return Verdict(path, kind, True, reason, "converted")
    read = [search.where[norm][0] for norm in search.calls[path] if norm in search.where]
    why = in_a_branch(_why(search, path), read, search.analysis) if read else _why(search, path)
    return Verdict(path, kind, False, why.reason, why.code)


def _doors_out(search: _Search, converted: list[Norm], paths: list[str]) -> list[dict[str, Any]]:
    """The ways out, other than the model's outputs, that return rotated streams or what their norms give."""
    read = [search.where[norm][0] for norm in converted]
    streams = shifted_doors(search.analysis, [*read, *search.streams])
    norms = doors_behind(search.analysis.graph, (search.moved[path] for path in paths))
    return [*streams, *(row for row in norms if row not in streams)]


def _notes(streams: list[Stream], doors: list[str], shifted: list[str], options: Options) -> list[str]:
    notes = [f"in the new basis are returned: {', '.join(shifted)}"] if shifted else []
    if doors:
        notes.append(f"{', '.join(doors)} must be in the new basis, as what the output's own embeddings give is")
    if options.rotation not in ROTATIONS:
        return notes
    return notes + list(_without_hadamard((stream.size for stream in streams), options))


def _notes_of(pairs: list[Pair], options: Options) -> list[str]:
    """What is said of rotated values."""
    if not options.values:
        return []
    if not pairs:
        return ["no values are rotated: none are written and read by linear maps alone (--values)"]
    weights = dict.fromkeys(reader.weight for pair in pairs for reader in pair.readers)
    notes = [
        f"values are rotated between {len(weights)} pairs of linear maps: those that `{next(iter(weights))}` reads"
    ]
    notes[0] += " and others" if len(weights) > 1 else ""
    if options.rotation not in ROTATIONS:
        notes.append("values take a Hadamard matrix: the file's is for the streams")
    if any(pair.cached for pair in pairs):
        notes.append("caches hold rotated values: those of the original do not fit")
    return notes + list(_without_hadamard((pair.stream.size for pair in pairs), options))


def _without_hadamard(sizes: Iterable[int], options: Options) -> Iterator[str]:
    """Of each width that has no Hadamard matrix what takes its place."""
    for size in dict.fromkeys(sizes):
        order = order_without_hadamard(size)
        if options.rotation != "random" and order > 1:
            yield (
                f"no Hadamard matrix of {size} channels is known here: a random orthogonal matrix of order {order} "
                "takes its place in one factor"
            )
