"""Rows that differ only in layer numbers, told as one: ``encoder.layers.{0-11}.norm1``, 12 times.

Nothing is lost on the way: a group's name stands for exactly its members, and a number in the text that goes with a
number of the name (the same layer, the layer before) keeps going with it. Rows of which that cannot be said stay apart.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

NAME_NUMBER = re.compile(r"(?<![^.])(0|[1-9]\d*)(?![^.])")
"""A whole component of a dotted name: the 3 of ``layers.3.norm1``, not its 1."""
TEXT_NUMBER = re.compile(r"(?<![\w-])(0|[1-9]\d*)(?!\w)")
"""A number that is no part of a word: the 3 of ``layers.3.norm1``, not its 1."""

Numbers = tuple[int, ...]
Box = tuple[Numbers, ...]
"""One sorted set of numbers for each position; stands for their product."""


@dataclass(frozen=True)
class Row:
    """Something said of something named.

    Attributes:
        name: dotted, e.g. a module's path.
        text: what is said of it.
        key: rows of different keys are never collapsed.
    """

    name: str
    text: str = ""
    key: Hashable = ()


@dataclass(frozen=True)
class Group:
    """Rows that are alike.

    Attributes:
        name: theirs, with sets for the numbers that differ: ``h.{0-3,5}.ln_1``.
        text: theirs, likewise.
        key: theirs.
        members: their names, in the order given.
    """

    name: str
    text: str
    key: Hashable
    members: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many rows it stands for."""
        return len(self.members)


@dataclass(frozen=True)
class _Parsed:
    row: Row
    index: int
    name: Numbers
    text: Numbers


def collapse(rows: Iterable[Row]) -> list[Group]:
    """Group rows whose names, and texts, differ only in numbers that vary together.

    Returns:
        The groups in the order of their first members. The members of all groups are the rows, each once.
    """
    shapes: dict[Hashable, list[_Parsed]] = {}
    for index, row in enumerate(rows):
        shape = (NAME_NUMBER.sub("#", row.name), TEXT_NUMBER.sub("#", row.text), row.key)
        parsed = _Parsed(row, index, _numbers(NAME_NUMBER, row.name), _numbers(TEXT_NUMBER, row.text))
        shapes.setdefault(shape, []).append(parsed)
    groups: list[tuple[int, Group]] = []
    for alike in shapes.values():
        for part in _consistent(alike):
            for box in boxes(dict.fromkeys(p.name for p in part)):
                members = [p for p in part if all(n in numbers for n, numbers in zip(p.name, box, strict=True))]
                groups.append((members[0].index, _group(members, box)))
    return [group for _, group in sorted(groups, key=lambda pair: pair[0])]


def ranges(numbers: Iterable[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}{'-' if len(run) > 2 else ','}{run[-1]}" for run in runs
    )


def boxes(tuples: Iterable[Numbers]) -> list[Box]:
    """Disjoint products of sets that together hold exactly ``tuples`` (all of one length).

    >>> boxes([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
    [((0, 1), (0, 1)), ((2,), (0,))]
    """
    distinct = list(dict.fromkeys(tuples))
    if not distinct or not distinct[0]:
        return [()] if distinct else []
    rests: dict[int, list[Numbers]] = {}
    for first, *rest in distinct:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[frozenset[Numbers], list[int]] = {}
    for first, follow in rests.items():
        firsts.setdefault(frozenset(follow), []).append(first)
    return [(tuple(sorted(first)), *box) for first in firsts.values() for box in boxes(rests[first[0]])]


def _numbers(pattern: re.Pattern[str], text: str) -> Numbers:
    return tuple(int(n) for n in pattern.findall(text))


def _relations(parts: Sequence[_Parsed], position: int) -> list[list[int]]:
    """The ways to describe the text's number at ``position``: its value, or its distance to each of the name's."""
    values = [p.text[position] for p in parts]
    distances = [[v - p.name[k] for p, v in zip(parts, values, strict=True)] for k in range(len(parts[0].name))]
    return [values, *distances]


def _consistent(parts: list[_Parsed]) -> list[list[_Parsed]]:
    """Split, as little as possible, until each number of the text is constant or goes with a number of the name."""
    for position in range(len(parts[0].text)):
        best = min(_relations(parts, position), key=lambda relation: len(set(relation)))
        if len(set(best)) > 1:
            split: dict[int, list[_Parsed]] = {}
            for value, part in zip(best, parts, strict=True):
                split.setdefault(value, []).append(part)
            return [piece for some in split.values() for piece in _consistent(some)]
    return [parts]


def _group(members: list[_Parsed], box: Box) -> Group:
    row = members[0].row
    shown = [_shown(tuple({p.text[i] for p in members})) for i in range(len(members[0].text))]
    return Group(
        name=_fill(NAME_NUMBER, row.name, [_shown(numbers) for numbers in box]),
        text=_fill(TEXT_NUMBER, row.text, shown),
        key=row.key,
        members=tuple(p.row.name for p in members),
    )


def _shown(numbers: Numbers) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{{{ranges(numbers)}}}"


def _fill(pattern: re.Pattern[str], text: str, values: list[str]) -> str:
    left = iter(values)
    return pattern.sub(lambda match: next(left), text)
