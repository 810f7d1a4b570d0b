"""Where centring operations are inserted: greedily, the place first behind which most norms read mean-free values.

Several calls of a model share its modules, so a hook that one call wants acts in all of them. Streams that share such a
place are therefore decided together: what comes from outside in one call and what comes from a table in another have
a place behind them where both are the same value, and one operation there serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set

from normconvert.analysis.streams import Analysis, AxisRef, Provenance, Stream
from normconvert.options import Options
from normconvert.rewrites.centring import Centring, editability, leaves_tied_table
from normconvert.tracing.in_place_writes import Boundary

Boundaries = Mapping[Boundary, list[AxisRef]]


def centre_streams(analysis: Analysis, options: Options) -> Centring:
    """Decide for all streams of the graph."""
    result, boundaries = editability(analysis, options)
    for streams in together(result.usable, boundaries):
        insert(streams, result, options, boundaries)
    return result


def together(streams: Sequence[Stream], boundaries: Boundaries) -> Iterator[list[Stream]]:
    """The streams in groups that share no place for an operation, in order."""
    stream_of = {ref: number for number, stream in enumerate(streams) for ref in stream.members}
    group = list(range(len(streams)))
    for refs in boundaries.values():
        joined = {group[stream_of[ref]] for ref in refs if ref in stream_of}
        group = [min(joined) if own in joined else own for own in group]
    for first in dict.fromkeys(group):
        yield [stream for stream, own in zip(streams, group, strict=True) if own == first]


class _Group:
    """Streams that are decided together. Nothing in here changes: what is mean-free is always an argument."""

    def __init__(self, streams: list[Stream], rules: Centring, boundaries: Boundaries) -> None:
        self.rules, self.boundaries = rules, boundaries
        self.members: dict[AxisRef, Provenance] = {
            ref: made for stream in streams for ref, made in stream.members.items()
        }
        self.dependents: dict[AxisRef, list[AxisRef]] = defaultdict(list)
        for ref, made in self.members.items():
            for part in made.parts if made.kind == "sum" else ():
                self.dependents[part].append(ref)
        self.norms_at: list[dict[AxisRef, int]] = []
        for stream in streams:
            norms_at: dict[AxisRef, int] = defaultdict(int)
            for norm, ref in stream.norms:
                # A norm that cannot be replaced gains nothing from a mean-free input.
                norms_at[ref] += norm.module is not None
            self.norms_at.append(norms_at)
        used = {
            key: sum(any(s in stream.members for s in calls) for stream in streams) for key, calls in boundaries.items()
        }
        # What is a place of more calls serves more of them with one operation.
        key_of = {ref: key for key, calls in boundaries.items() for ref in calls}
        found = dict.fromkeys(key_of[ref] for ref in self.members if ref in key_of)
        self.places = sorted(found, key=used.__getitem__, reverse=True)

    def at(self, key: Boundary) -> list[AxisRef]:
        """The values of the group at a place."""
        return [ref for ref in self.boundaries[key] if ref in self.members]

    def follows(self, ref: AxisRef, clean: Set[AxisRef], new: Set[AxisRef] = frozenset()) -> bool:
        """Whether a value is mean-free by itself, given the edits, or because all that it is made of is."""
        made, rules = self.members[ref], self.rules
        if ref in rules.given:
            return True
        if made.kind == "parameter":
            return ref in rules.editable or ref in rules.untied
        if made.kind == "scale":
            return ref in rules.scales
        # P(a + b) = Pa + Pb: every part has to be mean-free (arXiv 2305.14858, section 3).
        return made.kind == "sum" and not made.rest and all(part in clean or part in new for part in made.parts)

    def spread(self, given: Iterable[AxisRef], clean: Set[AxisRef]) -> set[AxisRef]:
        """What becomes mean-free in addition to ``clean`` once the values ``given`` are."""
        new = {ref for ref in given if ref not in clean}
        work = list(new)
        while work:
            for ref in self.dependents[work.pop()]:
                if ref not in clean and ref not in new and self.follows(ref, clean, new):
                    new.add(ref)
                    work.append(ref)
        return new

    def dirty(self, clean: Set[AxisRef]) -> int:
        """Calls of norms that read what is not mean-free."""
        return sum(count for norms_at in self.norms_at for ref, count in norms_at.items() if ref not in clean)

    def gains(self, new: Collection[AxisRef]) -> list[int]:
        """For each stream how many norms would read mean-free values in addition."""
        return [sum(norms_at.get(ref, 0) for ref in new) for norms_at in self.norms_at]


def insert(streams: list[Stream], result: Centring, options: Options, boundaries: Boundaries) -> None:
    """Find the mean-free values of some streams, inserting centring operations where they win enough norms.

    ``result.clean`` is closed at every step: it holds a member if and only if an operation stands there, it is a tensor
    or a scale that is edited, or it is a sum of members that it holds. An operation only adds to it, so one that pays
    is never regretted, and the search ends.

    Args:
        streams: a group of :func:`together`.
        result: gains mean-free values and operations.
        options: of the conversion.
        boundaries: places, and the values there.
    """
    group = _Group(streams, result, boundaries)
    # A hook that another stream wanted works here as well.
    given = [ref for key in result.inserted for ref in group.at(key)]
    given += [ref for ref in group.members if group.follows(ref, result.clean)]
    result.clean |= group.spread(given, result.clean)
    own = _places_of_tied_tables(group, result, options)
    while dirty := group.dirty(result.clean):
        best: tuple[int, Boundary, set[AxisRef]] | None = None
        for key in group.places:
            new = group.spread(group.at(key), result.clean)
            gains = group.gains(new)
            # On an input that a call may leave out an operation costs nothing where there is none.
            least = 1 if key in result.optional or own(new) else options.min_gain or 1
            # Of equal places the first is taken, hence >: a plan is the same every time.
            if max(gains) >= least and sum(gains) > (best[0] if best else 0):
                best = (sum(gains), key, new)
                # No place can win more.
                if sum(gains) == dirty:
                    break
        if best is None:
            return
        result.inserted.append(best[1])
        result.clean |= best[2]


def _places_of_tied_tables(group: _Group, result: Centring, options: Options) -> Callable[[Collection[AxisRef]], bool]:
    """Tells whether values hold all norms that an operation behind a tied embedding would win, if there are any."""
    if options.tied != "center":
        return lambda new: False
    behind = [key for key in group.places if any(leaves_tied_table(s[0], result) for s in group.boundaries[key])]
    won = [group.spread(group.at(key), result.clean) for key in behind]
    read = [{ref for norms_at in group.norms_at for ref in norms_at if ref in new} for new in won]
    read = [refs for refs in read if refs]
    return lambda new: any(refs <= set(new) for refs in read)
