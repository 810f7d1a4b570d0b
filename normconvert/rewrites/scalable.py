"""Which residual streams can be stored times a number: what writes into them takes it, what reads them its inverse.

A number passes where a rotation does not: the weight of a layer scale takes it, and that of a norm whose result is
written into the stream. A linear map that reads a stream past its norms takes the inverse. A table that is the output
head, too, stays one where the norm before the head takes the inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.analysis.rms_by_hand import is_number, plain
from normconvert.analysis.streams import Analysis, AxisRef, Leak, Provenance, Stream, described, operation
from normconvert.options import Options
from normconvert.rewrites.centring import can_untie, leaks_of
from normconvert.rewrites.epsilons import attributes_of
from normconvert.rewrites.readers import CUT, STORED, Unfoldable, values_behind, weight_of
from normconvert.rewrites.verdicts import ALLOWED, Obstacle, misuse, obstacle_among
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import ALIASES, COPIES, MOVES, STRETCHES, VIEWS, name_of, readers


@dataclass(frozen=True)
class Take:
    """A tensor that takes the number of a stream.

    Attributes:
        name: of the tensor.
        offset: what the model adds to it.
        parameter: its node.
    """

    name: str
    offset: float
    parameter: fx.Node


@dataclass
class Search:
    """Which streams can be scaled.

    Attributes:
        stays: stream, by identity -> why it stays.
        refused: norm that cannot read a scaled stream -> why.
        keep_features: ways out other than the model's outputs return what they did.
        attributes: norm -> where its module keeps its eps.
        reading: linear map that reads a stream past its norms -> its weight.
        heads: tied table -> the norms before the heads that it is, which take what the table does not.
        untied: tied tables that become two.
    """

    analysis: Analysis
    calls: dict[str, list[Norm]]
    where: dict[Norm, tuple[Stream, AxisRef]]
    usable: list[Stream]
    keep_features: bool = False
    stays: dict[int, Obstacle] = field(default_factory=dict)
    refused: dict[str, Obstacle] = field(default_factory=dict)
    attributes: dict[str, list[str] | None] = field(default_factory=dict)
    reading: dict[fx.Node, fx.Node] = field(default_factory=dict)
    heads: dict[fx.Node, list[str]] = field(default_factory=dict)
    untied: set[AxisRef] = field(default_factory=set)

    @property
    def streams(self) -> list[Stream]:
        """Those that are not known to stay."""
        return [stream for stream in self.usable if id(stream) not in self.stays]

    def reads(self, norm: Norm) -> bool:
        """Whether a norm reads one of them."""
        return norm in self.where and any(self.where[norm][0] is stream for stream in self.streams)


def search_scale(graph: Graph, options: Options) -> Search:
    """Find the streams that can be scaled, and all their norms with them."""
    norms = find_norms(graph, uncentred=True)
    analysis = Analysis(graph, norms, mean_only=False)
    analysis.add_written()
    reading: dict[fx.Node, fx.Node] = {}
    leaks: dict[int, list[Leak]] = {}
    for stream in analysis.streams:
        leaks[id(stream)] = []
        for leak in leaks_of(stream, options):
            if (weight := weight_of(graph, leak, STORED | CUT)) is None:
                leaks[id(stream)].append(leak)
            else:
                reading[leak.reader] = weight
    calls = by_path(norms)
    where = {norm: (stream, ref) for stream in analysis.streams for norm, ref in stream.norms}
    search = Search(analysis, calls, where, [s for s in analysis.streams if not leaks[id(s)]], options.keep_features)
    search.reading = reading
    for path, group in calls.items():
        found = _obstacle(group, where, leaks) or misuse(path, group, graph) or attributes_of(graph, group)
        if isinstance(found, Obstacle):
            search.refused[path] = found
        else:
            search.attributes[path] = found
    # Each round leaves more streams as they are, or is the last.
    while True:
        before = len(search.stays)
        _leave_more(search)
        if len(search.stays) == before:
            return search


def _obstacle(
    group: list[Norm], where: dict[Norm, tuple[Stream, AxisRef]], leaks: dict[int, list[Leak]]
) -> Obstacle | None:
    """What keeps a norm from reading a scaled stream: what it is, or who else reads that."""
    why = obstacle_among(group, where, lambda stream: leaks[id(stream)])
    if why is None:
        return None
    text = f"{why.returned}, unscaled{ALLOWED}" if why.returned else why.reason
    return replace(why, reason=text.replace("with its mean, which", "unscaled, which"))


def _leave_more(search: Search) -> None:
    """Leave the streams that cannot be scaled unless others are, which stay."""
    streams = search.streams
    members = {ref: made for stream in streams for ref, made in stream.members.items()}
    search.heads, search.untied = {}, set()
    for stream in streams:
        if why := _unscalable_norm(search, stream) or _unscalable_reader(search, stream, streams):
            search.stays[id(stream)] = why
            continue
        for ref, made in stream.members.items():
            if why := _unscalable(search, ref, made, members):
                search.stays[id(stream)] = why
                break


def _unscalable_norm(search: Search, stream: Stream) -> Obstacle | None:
    """Why the norms of a stream keep it as it is."""
    for path in dict.fromkeys(norm.path for norm, _ in stream.norms):
        # A norm is called with streams that are scaled, or with none.
        if path in search.refused or not all(search.reads(norm) for norm in search.calls[path]):
            why = search.refused.get(path) or Obstacle("shared", "other calls of it read what stays.")
            text = f"its stream stays as it is: the norm {described(path)} reads it, and {why.reason}"
            return Obstacle(why.code, text)
    return None


def readers_of_stream(search: Search, stream: Stream) -> dict[fx.Node, fx.Node]:
    """The linear maps that read a stream past its norms, and their weights."""
    nodes = {leak.reader for leak in stream.leaks if leak.code == "linear"}
    return {node: weight for node, weight in search.reading.items() if node in nodes}


def _unscalable_reader(search: Search, stream: Stream, streams: list[Stream]) -> Obstacle | None:
    """Why the linear maps that read a stream past its norms cannot take the inverse."""
    reading = {node for one in streams for node in readers_of_stream(search, one)}
    for node, weight in readers_of_stream(search, stream).items():
        other = next((user for user in readers(weight, STORED | CUT) if user not in reading), None)
        if other is not None:
            name = search.analysis.graph.parameters[weight].name
            text = f"{operation(node)} reads it directly, and {operation(other)} reads `{name}`, too"
            return Obstacle("linear", f"its stream stays as it is: {text}.")
    return None


def _unscalable(search: Search, ref: AxisRef, made: Provenance, members: dict[AxisRef, Provenance]) -> Obstacle | None:
    """Why a value of a stream cannot take a number."""
    node, graph = ref[0], search.analysis.graph
    why = ""
    if made.kind == "opaque":
        why = "" if node in graph.outside else f"it contains {made.reason}"
    elif made.kind == "sum":
        why = f"it contains {operation(node)}, {made.rest}" if made.rest else ""
    elif made.kind == "norm":
        why = _unscalable_writer(search, norm_of(search, node), members)
    elif made.kind == "scale":
        take = factor(search, made)
        if take is None or len(graph.parameters[take.parameter].aliases) > 1:
            why = f"{operation(node)} scales it channel by channel, by what is no tensor alone"
        else:
            scales = {member[0] for member, one in members.items() if one.kind == "scale"}
            other = next((user for user in _data_readers(search, take.parameter) if user not in scales), None)
            why = f"`{take.name}` scales it channel by channel, and {operation(other)} reads that, too" if other else ""
    elif others := list(search.analysis.other_readers(ref, members.__contains__)):
        if paths := _norms_before(search, node, others):
            search.heads[node] = paths
        elif can_untie(search.analysis, ref, others):
            search.untied.add(ref)
        else:
            name = graph.parameters[node].name
            why = f"`{name}` writes into it, and {operation(others[0])} reads that, too"
    if not why and made.kind in ("norm", "scale") and node not in search.analysis.data:
        # Of what no input changes (queries that are learnt, say) a stream does not follow who else reads it.
        other = next(iter(search.analysis.other_readers(ref, members.__contains__)), None)
        why = f"it contains {operation(node)}, and {operation(other)} reads that, too" if other is not None else ""
    code = "shared" if made.kind == "parameter" else "opaque"
    return Obstacle(code, f"its stream stays as it is: {why}.") if why else None


def norm_of(search: Search, result: fx.Node) -> Norm:
    """The norm whose result a value is."""
    return next(norm for norm in search.analysis.norms if norm.result is result)


def _unscalable_writer(search: Search, norm: Norm, members: dict[AxisRef, Provenance]) -> str:
    """Why the weight of a norm that writes into a stream cannot take a number; empty if it can."""
    group = search.calls[norm.path]
    name = f"the norm {described(norm.path)} writes into it, and"
    if norm.module is None:
        return f"{name} {norm.obstacle}"
    if (why := misuse(norm.path, group, search.analysis.graph)) is not None:
        return f"{name} {why.reason.rstrip('.')}"
    if norm.module["weight"] is None or norm.output is not norm.result:
        return f"{name} has no weight that could take a number"
    inside = all((one.result, one.place) in members for one in group)
    return "" if inside else f"{name} into what stays, too"


_REARRANGES = COPIES | ALIASES | MOVES | VIEWS | STRETCHES


def factor(search: Search, made: Provenance) -> Take | None:
    """The tensor that a value is scaled by, and the number that is added to it on the way; None if there is more."""
    graph, node, offset = search.analysis.graph, made.parts[1][0], 0.0
    while (parameter := graph.parameters.get(node)) is None:
        if name_of(node) == "aten.add" and plain(node) and is_number(node.args[1]):
            offset += float(node.args[1])  # type: ignore[arg-type]
        elif name_of(node) not in _REARRANGES:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return Take(parameter.name, offset, node) if parameter.stored else None


def _data_readers(search: Search, node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a tensor, followed through values that are made of it alone; what else is made of it reads it, too."""
    for user in readers(node):
        alone = name_of(user) in _REARRANGES or (name_of(user) == "aten.add" and is_number(user.args[1]))
        if user not in search.analysis.data and alone and user.args[0] is node:
            yield from _data_readers(search, user)
        else:
            yield user


def _norms_before(search: Search, table: fx.Node, heads: list[fx.Node]) -> list[str]:
    """The norms whose results these linear maps, whose weight is ``table``, read, and nobody else; none if others do.

    Where the table takes s, they take 1 / s.
    """
    served: set[fx.Node] = set()
    found = []
    for path, group in search.calls.items():
        starts: list[AxisRef] = [(norm.output, norm.place) for norm in group if norm.place is not None]
        try:
            # Zeros that join on the way stay zeros.
            leaks = values_behind(search.analysis, starts, False)[1]
        except Unfoldable:
            continue
        leaks = [leak for leak in leaks if search.keep_features or leak.code != "features"]
        if leaks and all(leak.reader in heads and weight_of(search.analysis.graph, leak) is table for leak in leaks):
            settings = group[0].module or {}
            if settings.get("weight") is None or misuse(path, group, search.analysis.graph):
                return []
            served |= {leak.reader for leak in leaks}
            found.append(path)
    return found if served == set(heads) else []


def groups_of(search: Search) -> list[list[Stream]]:
    """The streams that can be scaled, those together that take one number: they share a tensor or a norm."""
    groups: list[tuple[set[Any], list[Stream]]] = []
    for stream in search.streams:
        shared: set[Any] = {norm.path for norm, _ in stream.norms}
        # A tensor that reads one stream and writes into another takes both numbers.
        shared |= {("reads", weight) for weight in readers_of_stream(search, stream).values()}
        for ref, made in stream.members.items():
            if made.kind == "parameter":
                shared |= {ref[0], *search.heads.get(ref[0], ())}
            elif made.kind == "scale" and (take := factor(search, made)) is not None:
                shared.add(take.parameter)
            elif made.kind == "norm":
                shared.add(("writes", norm_of(search, ref[0]).path))
        joined = [stream]
        apart = []
        for names, group in groups:
            if names & shared:
                shared, joined = shared | names, [*group, *joined]
            else:
                apart.append((names, group))
        groups = [*apart, (shared, joined)]
    order = {id(stream): number for number, stream in enumerate(search.streams)}
    found = [sorted(group, key=lambda stream: order[id(stream)]) for _, group in groups]
    return sorted(found, key=lambda group: order[id(group[0])])
