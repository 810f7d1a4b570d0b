"""Which part of the streams is compressed: all values of it in one channel less, by as few operations as pay.

A value that is compressed must be made of compressed values only and read as such, so the values between two module
boundaries are all compressed or none is. At a boundary an operation may turn a whole value into a compressed one. What
cannot be compressed (a GELU's result, a tensor that others read, a norm that is no module) keeps what is made of it,
and what that is made of, up to such operations. Choosing them so that the norms lost and the operations, each at the
price of ``min_gain`` norms, are least is a minimum cut.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from normconvert.analysis.streams import Analysis, Spot, Stream, operation
from normconvert.rewrites.centring import Centring, axis_of
from normconvert.tracing.in_place_writes import MarkKey

if TYPE_CHECKING:
    import networkx as nx

Marks = Mapping[MarkKey, list[Spot]]

UNIT = 5040
"""What a norm counts, so that the price of an operation divides by the number of its calls."""


@dataclass(frozen=True)
class Stays:
    """Why a value stays as it is: what it is, in words; or ``whole``, a sentence by itself and the class of reason."""

    what: str
    whole: str = ""
    code: str = "not-compressible"


@dataclass(frozen=True)
class Region:
    """The outcome.

    Attributes:
        compressed: values in one channel less.
        inserted: the operations, with the axis that each compresses.
        reasons: for every value that stays as it is why, and the class of the reason.
    """

    compressed: frozenset[Spot]
    inserted: dict[MarkKey, int]
    reasons: dict[Spot, tuple[str, str]]


@dataclass
class _Sets:
    """Values that are compressed together or not: disjoint sets."""

    parent: dict[Spot, Spot] = field(default_factory=dict)

    def find(self, spot: Spot) -> Spot:
        root = spot
        while (up := self.parent.get(root, root)) != root:
            root = up
        while spot != root:
            self.parent[spot], spot = root, self.parent.get(spot, spot)
        return root

    def union(self, a: Spot, b: Spot) -> None:
        self.parent[self.find(a)] = self.find(b)


def choose_region(
    analysis: Analysis, survey: Centring, marks: Marks, stay: Mapping[Spot, Stays], min_gain: int
) -> Region:
    """The best region of the usable streams.

    Args:
        analysis: the streams.
        survey: which of them and which tensors may be changed.
        marks: where operations may stand.
        stay: values that cannot be compressed, with the reason.
        min_gain: what an operation costs, in norms.
    """
    forbidden: set[MarkKey] = set()
    while True:
        region, halfway = _cut(analysis, survey, marks, stay, min_gain, forbidden)
        if not halfway:
            return region
        # A hook runs in every call of its module, so it cannot compress in one and not in another.
        forbidden |= halfway


def _cut(
    analysis: Analysis,
    survey: Centring,
    marks: Marks,
    stay: Mapping[Spot, Stays],
    min_gain: int,
    forbidden: set[MarkKey],
) -> tuple[Region, set[MarkKey]]:
    """One minimum cut: the region, and the places that have to be forbidden before the next."""
    problem = _build(analysis, survey, marks, stay, forbidden)
    graph, staying = _solve(_capacities(problem, survey, marks, min_gain))
    return _read(problem, survey, marks, graph, staying)


@dataclass
class _Problem:
    """What may be cut where.

    Attributes:
        sets: values between two places where an operation may stand: compressed together or not.
        seeds: values that cannot be compressed, with the reason.
        steps: (value before, value behind, place) of each operation that there may be.
    """

    sets: _Sets
    seeds: dict[Spot, Stays]
    steps: list[tuple[Spot, Spot, MarkKey]]


def _build(
    analysis: Analysis, survey: Centring, marks: Marks, stay: Mapping[Spot, Stays], forbidden: set[MarkKey]
) -> _Problem:
    """Join what can only be compressed together."""
    key_of = {spot: key for key, calls in marks.items() if key not in forbidden for spot in calls}
    problem = _Problem(_Sets(), dict(stay), [])
    calls: dict[Hashable, Spot] = {}  # a norm or a layer scale that is used several times
    for stream in survey.usable:
        for spot, made in stream.members.items():
            if what := _obstacle(analysis, stream, spot, survey):
                problem.seeds.setdefault(spot, Stays(what))
            if spot in key_of:
                problem.steps += [(part, spot, key_of[spot]) for part in made.parts]
            elif made.how == "sum":
                for part in made.parts:
                    problem.sets.union(spot, part)
            elif spot in survey.scales:
                problem.sets.union(spot, calls.setdefault(survey.scales[spot].factor, spot))
        for norm, spot in stream.norms:
            problem.sets.union(spot, calls.setdefault(norm.path, spot))
    return problem


def _capacities(
    problem: _Problem, survey: Centring, marks: Marks, min_gain: int
) -> dict[tuple[Hashable, Hashable], float]:
    """The edges of the network, with what it costs to cut each."""
    find = problem.sets.find
    norms: dict[Spot, set[str]] = defaultdict(set)
    for stream in survey.usable:
        for norm, spot in stream.norms:
            norms[find(spot)].add(norm.path)
    capacity: dict[tuple[Hashable, Hashable], float] = defaultdict(float)
    for spot in problem.seeds:
        capacity["stay", find(spot)] = math.inf
    for root, paths in norms.items():
        capacity[root, "norms"] = UNIT * len(paths)
    for part, spot, key in problem.steps:
        a, b = find(part), find(spot)
        if a != b:
            capacity[a, b] += -(-UNIT * min_gain // len(marks[key]))
            capacity[b, a] = math.inf  # what stays as it is is made of what stays as it is
    return capacity


def _solve(capacity: Mapping[tuple[Hashable, Hashable], float]) -> tuple[nx.DiGraph, set[Hashable]]:
    """The network, and the sets that stay as they are."""
    import networkx as nx  # takes a while, and other conversions need no cut

    graph = nx.DiGraph()
    graph.add_nodes_from(["stay", "norms"])
    graph.add_edges_from((a, b, {"capacity": c}) for (a, b), c in capacity.items())
    # Of equal cuts the one nearest to what stays: networkx gives the one nearest to the target, hence reversed.
    _, (_, staying) = nx.minimum_cut(graph.reverse(copy=False), "norms", "stay")
    return graph, staying


def _read(
    problem: _Problem, survey: Centring, marks: Marks, graph: nx.DiGraph, staying: set[Hashable]
) -> tuple[Region, set[MarkKey]]:
    """The region that a cut means, and the places at which some calls would compress and others not."""
    spots = [spot for stream in survey.usable for spot in stream.members]
    compressed = {spot for spot in spots if problem.sets.find(spot) not in staying}
    inserted, halfway = {}, set()
    cuts: dict[MarkKey, set[tuple[bool, bool]]] = defaultdict(set)
    for part, spot, key in problem.steps:
        cuts[key].add((part in compressed, spot in compressed))
    for key, cut in cuts.items():
        if (False, True) in cut:
            inserted[key] = axis_of(marks[key][0])
            halfway |= {key} if len(cut) > 1 else set()
    reasons = _reasons(graph, problem.sets, spots, compressed, problem.seeds)
    return Region(frozenset(compressed), inserted, reasons), halfway


def _obstacle(analysis: Analysis, stream: Stream, spot: Spot, survey: Centring) -> str:
    """Why a value cannot be compressed by changing what it is made of; empty if it can."""
    made = stream.members[spot]
    if made.how == "parameter" and spot not in survey.editable and spot not in survey.untied:
        reader = survey.blocked.get(spot)
        name = analysis.graph.parameters[spot[0]].name
        return f"the parameter `{name}`, which {operation(reader) if reader else 'others'} reads too"
    if made.how == "scale" and spot not in survey.scales:
        return f"{operation(spot[0])}, a scale by channel that cannot be folded"
    if made.reason:
        return made.reason
    if made.rest:
        return f"{operation(spot[0])}, {made.rest}"
    return ""


def _reasons(
    graph: nx.DiGraph, sets: _Sets, spots: list[Spot], compressed: set[Spot], seeds: Mapping[Spot, Stays]
) -> dict[Spot, tuple[str, str]]:
    """For each value that stays the nearest one that cannot be compressed, as a sentence, and the class of reason."""
    nearest: dict[Spot, Stays] = {}
    for spot, reason in seeds.items():
        nearest.setdefault(sets.find(spot), reason)
    work = list(nearest)
    for root in work:  # breadth first; the list grows
        for other in (*graph.successors(root), *graph.predecessors(root)):
            if other not in ("stay", "norms") and other not in nearest:
                nearest[other] = nearest[root]
                work.append(other)
    found: dict[Spot, tuple[str, str]] = {}
    for spot in spots:
        stays = nearest.get(sets.find(spot)) if spot not in compressed else None
        if stays is not None:
            text = f"its stream cannot be stored in fewer channels, or not with gain: it contains {stays.what}"
            found[spot] = (stays.whole or text, stays.code)
    return found
