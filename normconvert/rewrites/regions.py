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
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normconvert.analysis.streams import Analysis, AxisRef, Stream, operation
from normconvert.rewrites.centring import Centring, axis_of
from normconvert.tracing.in_place_writes import Boundary

if TYPE_CHECKING:
    import networkx as nx
    from networkx.utils import UnionFind

Boundaries = Mapping[Boundary, list[AxisRef]]

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

    compressed: frozenset[AxisRef]
    inserted: dict[Boundary, int]
    reasons: dict[AxisRef, tuple[str, str]]


def choose_region(
    analysis: Analysis, editability: Centring, boundaries: Boundaries, stay: Mapping[AxisRef, Stays], min_gain: int
) -> Region:
    """The best region of the usable streams.

    Args:
        analysis: the streams.
        editability: which of them and which tensors may be changed.
        boundaries: where operations may stand.
        stay: values that cannot be compressed, with the reason.
        min_gain: what an operation costs, in norms.
    """
    forbidden: set[Boundary] = set()
    while True:
        problem = _build(analysis, editability, boundaries, stay, forbidden)
        graph, staying = _solve(_capacities(problem, editability, boundaries, min_gain))
        region, halfway = _read(problem, editability, boundaries, graph, staying)
        if not halfway:
            return region
        # A hook runs in every call of its module, so it cannot compress in one and not in another.
        forbidden |= halfway


@dataclass
class _Problem:
    """What may be cut where.

    Attributes:
        sets: values between two places where an operation may stand: compressed together or not.
        seeds: values that cannot be compressed, with the reason.
        steps: (value before, value behind, place) of each operation that there may be.
    """

    sets: UnionFind
    seeds: dict[AxisRef, Stays]
    steps: list[tuple[AxisRef, AxisRef, Boundary]]


def _build(
    analysis: Analysis,
    editability: Centring,
    boundaries: Boundaries,
    stay: Mapping[AxisRef, Stays],
    forbidden: set[Boundary],
) -> _Problem:
    """Join what can only be compressed together."""
    from networkx.utils import UnionFind  # takes a while, and other conversions need no cut

    key_of = {ref: key for key, calls in boundaries.items() if key not in forbidden for ref in calls}
    problem = _Problem(UnionFind(), dict(stay), [])
    calls: dict[Hashable, AxisRef] = {}  # a norm or a layer scale that is used several times
    for stream in editability.usable:
        for ref, made in stream.members.items():
            if what := _obstacle(analysis, stream, ref, editability):
                problem.seeds.setdefault(ref, Stays(what))
            if ref in key_of:
                problem.steps += [(part, ref, key_of[ref]) for part in made.parts]
            elif made.kind == "sum":
                for part in made.parts:
                    problem.sets.union(ref, part)
            elif ref in editability.scales:
                problem.sets.union(ref, calls.setdefault(editability.scales[ref].factor, ref))
        for norm, ref in stream.norms:
            problem.sets.union(ref, calls.setdefault(norm.path, ref))
    return problem


def _capacities(
    problem: _Problem, editability: Centring, boundaries: Boundaries, min_gain: int
) -> dict[tuple[Hashable, Hashable], float]:
    """The edges of the network, with what it costs to cut each."""
    sets = problem.sets
    norms: dict[AxisRef, set[str]] = defaultdict(set)
    for stream in editability.usable:
        for norm, ref in stream.norms:
            norms[sets[ref]].add(norm.path)
    capacity: dict[tuple[Hashable, Hashable], float] = defaultdict(float)
    for ref in problem.seeds:
        capacity["stay", sets[ref]] = math.inf
    for root, paths in norms.items():
        capacity[root, "norms"] = UNIT * len(paths)
    for part, ref, key in problem.steps:
        a, b = sets[part], sets[ref]
        if a != b:
            capacity[a, b] += -(-UNIT * min_gain // len(boundaries[key]))
            capacity[b, a] = math.inf  # what stays as it is is made of what stays as it is
    return capacity


def _solve(capacity: Mapping[tuple[Hashable, Hashable], float]) -> tuple[nx.DiGraph, set[Hashable]]:
    """The network, and the sets that stay as they are."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(["stay", "norms"])
    graph.add_edges_from((a, b, {"capacity": c}) for (a, b), c in capacity.items())
    # Of equal cuts the one nearest to what stays: networkx gives the one nearest to the target, hence reversed.
    _, (_, staying) = nx.minimum_cut(graph.reverse(copy=False), "norms", "stay")
    return graph, staying


def _read(
    problem: _Problem, editability: Centring, boundaries: Boundaries, graph: nx.DiGraph, staying: set[Hashable]
) -> tuple[Region, set[Boundary]]:
    """The region that a cut means, and the places at which some calls would compress and others not."""
    refs = [ref for stream in editability.usable for ref in stream.members]
    compressed = {ref for ref in refs if problem.sets[ref] not in staying}
    inserted, halfway = {}, set()
    cuts: dict[Boundary, set[tuple[bool, bool]]] = defaultdict(set)
    for part, ref, key in problem.steps:
        cuts[key].add((part in compressed, ref in compressed))
    for key, cut in cuts.items():
        if (False, True) in cut:
            inserted[key] = axis_of(boundaries[key][0])
            halfway |= {key} if len(cut) > 1 else set()
    reasons = _reasons(graph, problem.sets, refs, compressed, problem.seeds)
    return Region(frozenset(compressed), inserted, reasons), halfway


def _obstacle(analysis: Analysis, stream: Stream, ref: AxisRef, editability: Centring) -> str:
    """Why a value cannot be compressed by changing what it is made of; empty if it can."""
    made = stream.members[ref]
    if made.kind == "parameter" and ref not in editability.editable and ref not in editability.untied:
        reader = editability.blocked.get(ref)
        name = analysis.graph.parameters[ref[0]].name
        return f"the parameter `{name}`, which {operation(reader) if reader else 'others'} reads too"
    if made.kind == "scale" and ref not in editability.scales:
        return f"{operation(ref[0])}, a scale by channel that cannot be folded"
    if made.reason:
        return made.reason
    if made.rest:
        return f"{operation(ref[0])}, {made.rest}"
    return ""


def _reasons(
    graph: nx.DiGraph, sets: UnionFind, refs: list[AxisRef], compressed: set[AxisRef], seeds: Mapping[AxisRef, Stays]
) -> dict[AxisRef, tuple[str, str]]:
    """For each value that stays the nearest one that cannot be compressed, as a sentence, and the class of reason."""
    nearest: dict[AxisRef, Stays] = {}
    for ref, reason in seeds.items():
        nearest.setdefault(sets[ref], reason)
    work = list(nearest)
    for root in work:  # breadth first; the list grows
        for other in (*graph.successors(root), *graph.predecessors(root)):
            if other not in ("stay", "norms") and other not in nearest:
                nearest[other] = nearest[root]
                work.append(other)
    found: dict[AxisRef, tuple[str, str]] = {}
    for ref in refs:
        stays = nearest.get(sets[ref]) if ref not in compressed else None
        if stays is not None:
            text = f"its stream cannot be stored in fewer channels, or not with gain: it contains {stays.what}"
            found[ref] = (stays.whole or text, stays.code)
    return found
