"""Where centring operations are inserted: greedily, the place first behind which most norms read mean-free values.

Several calls of a model share its modules, so a hook that one call wants acts in all of them. Streams that share such a
place are therefore decided together: what comes from outside in one call and what comes from a table in another have
a place behind them where both are the same value, and one operation there serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set

from normconvert.analysis.streams import Analysis, Made, Spot, Stream
from normconvert.options import Options
from normconvert.rewrites.centring import Centring, embedding_marks, survey
from normconvert.tracing.in_place_writes import MarkKey

Marks = Mapping[MarkKey, list[Spot]]


def centre_streams(analysis: Analysis, options: Options) -> Centring:
    """Decide for all streams of the graph."""
    result, marks = survey(analysis, options)
    for streams in together(result.usable, marks):
        insert(streams, result, options, marks)
    return result


def together(streams: Sequence[Stream], marks: Marks) -> Iterator[list[Stream]]:
    """The streams in groups that share no place for an operation, in order."""
    stream_of = {spot: number for number, stream in enumerate(streams) for spot in stream.members}
    group = list(range(len(streams)))
    for spots in marks.values():
        joined = {group[stream_of[spot]] for spot in spots if spot in stream_of}
        group = [min(joined) if own in joined else own for own in group]
    for first in dict.fromkeys(group):
        yield [stream for stream, own in zip(streams, group, strict=True) if own == first]


class _Group:
    """Streams that are decided together. Nothing in here changes: what is mean-free is always an argument."""

    def __init__(self, streams: list[Stream], rules: Centring, marks: Marks) -> None:
        self.rules, self.marks = rules, marks
        self.members: dict[Spot, Made] = {spot: made for stream in streams for spot, made in stream.members.items()}
        self.dependents: dict[Spot, list[Spot]] = defaultdict(list)
        for spot, made in self.members.items():
            for part in made.parts if made.how == "sum" else ():
                self.dependents[part].append(spot)
        self.norms_at: list[dict[Spot, int]] = []
        for stream in streams:
            norms_at: dict[Spot, int] = defaultdict(int)
            for norm, spot in stream.norms:
                # A norm that cannot be replaced gains nothing from a mean-free input.
                norms_at[spot] += norm.module is not None
            self.norms_at.append(norms_at)
        used = {key: sum(any(s in stream.members for s in calls) for stream in streams) for key, calls in marks.items()}
        # What is a place of more calls serves more of them with one operation.
        key_of = {spot: key for key, calls in marks.items() for spot in calls}
        found = dict.fromkeys(key_of[spot] for spot in self.members if spot in key_of)
        self.places = sorted(found, key=used.__getitem__, reverse=True)

    def at(self, key: MarkKey) -> list[Spot]:
        """The values of the group at a place."""
        return [spot for spot in self.marks[key] if spot in self.members]

    def follows(self, spot: Spot, clean: Set[Spot], new: Set[Spot] = frozenset()) -> bool:
        """Whether a value is mean-free by itself, given the edits, or because all that it is made of is."""
        made, rules = self.members[spot], self.rules
        if made.how == "parameter":
            return spot in rules.editable or spot in rules.untied
        if made.how == "scale":
            return spot in rules.scales
        # P(a + b) = Pa + Pb: every part has to be mean-free (arXiv 2305.14858, section 3).
        return made.how == "sum" and not made.rest and all(part in clean or part in new for part in made.parts)

    def spread(self, given: Iterable[Spot], clean: Set[Spot]) -> set[Spot]:
        """What becomes mean-free in addition to ``clean`` once the values ``given`` are."""
        new = {spot for spot in given if spot not in clean}
        work = list(new)
        while work:
            for spot in self.dependents[work.pop()]:
                if spot not in clean and spot not in new and self.follows(spot, clean, new):
                    new.add(spot)
                    work.append(spot)
        return new

    def dirty(self, clean: Set[Spot]) -> int:
        """Calls of norms that read what is not mean-free."""
        return sum(count for norms_at in self.norms_at for spot, count in norms_at.items() if spot not in clean)

    def gains(self, new: Collection[Spot]) -> list[int]:
        """For each stream how many norms would read mean-free values in addition."""
        return [sum(norms_at.get(spot, 0) for spot in new) for norms_at in self.norms_at]


def insert(streams: list[Stream], result: Centring, options: Options, marks: Marks) -> None:
    """Find the mean-free values of some streams, inserting centring operations where they win enough norms.

    ``result.clean`` is closed at every step: it holds a member if and only if an operation stands there, it is a tensor
    or a scale that is edited, or it is a sum of members that it holds. An operation only adds to it, so one that pays
    is never regretted, and the search ends.

    Args:
        streams: a group of :func:`together`.
        result: gains mean-free values and operations.
        options: of the conversion.
        marks: places, and the values there.
    """
    group = _Group(streams, result, marks)
    # A hook that another stream wanted works here as well.
    given = [spot for key in result.inserted for spot in group.at(key)]
    given += [spot for spot in group.members if group.follows(spot, result.clean)]
    result.clean |= group.spread(given, result.clean)
    own = _places_of_tied_tables(group, result, options)
    while dirty := group.dirty(result.clean):
        best: tuple[int, MarkKey, set[Spot]] | None = None
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


def _places_of_tied_tables(group: _Group, result: Centring, options: Options) -> Callable[[Collection[Spot]], bool]:
    """Tells whether values hold all norms that an operation behind a tied embedding would win, if there are any."""
    if options.tied != "center":
        return lambda new: False
    behind = [key for key in group.places if any(s[0] in embedding_marks(s, result) for s in group.marks[key])]
    won = [group.spread(group.at(key), result.clean) for key in behind]
    read = [{spot for norms_at in group.norms_at for spot in norms_at if spot in new} for new in won]
    read = [spots for spots in read if spots]
    return lambda new: any(spots <= set(new) for spots in read)
