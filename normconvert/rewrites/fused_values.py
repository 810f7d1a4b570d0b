"""Values that one linear map gives together with queries and keys: which rows of its weight write them.

Between the map and the values stand operations that only move numbers: views, slices, splits. So they are run on the
numbers of the rows in place of the map's results, and say themselves which rows arrive where, whether the parts lie one
behind the other or head by head. The rows may be edited if nobody sees them but by the values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from normconvert.analysis.channel_axes import ChannelAxis, is_float, shape_of
from normconvert.analysis.streams import Analysis, AxisRef, Stream
from normconvert.rewrites.readers import LINEAR_FORMS, STORED, Unfoldable, stored_vector, written_by
from normconvert.tracing.operations import (
    ALIASES,
    CONCATENATIONS,
    COPIES,
    GETITEM,
    MOVES,
    STRETCHES,
    VIEWS,
    name_of,
    readers,
)

SAME = COPIES | ALIASES
CUTS = {
    *["aten.slice", "aten.select", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.index"],
    GETITEM,
}
PASSED = SAME | CUTS | MOVES | VIEWS | STRETCHES
"""Operations whose results hold numbers of their first operand, at other places and nothing else."""


class Bias(NamedTuple):
    """A stored vector: its name, how many blocks it has, and the first of them among those of the linear map."""

    name: str
    blocks: int
    first: int


@dataclass(frozen=True)
class Rows:
    """The rows of a stored weight that write values, in blocks as large as a head.

    Attributes:
        weight: its name.
        axis: its dimension of the rows.
        bias: the bias that is added, or the part of it that these rows have; None if there is none.
        size: of a head.
        count: of all blocks.
        blocks: which of them write values.
        node: the linear map.
    """

    weight: str
    axis: int
    bias: Bias | None
    size: int
    count: int
    blocks: tuple[int, ...]
    node: fx.Node

    @property
    def recipe(self) -> tuple[Any, ...]:
        """All but the node: equal for two calls that ask the same of the weight."""
        return self.weight, self.axis, self.bias, self.size, self.count, self.blocks

    @property
    def edits(self) -> dict[str, dict[str, Any]]:
        """Tensor -> the keys of an edit that say where the channels are."""
        found = {self.weight: {"axis": self.axis, "outer": self.count, "inner": 1, "blocks": list(self.blocks)}}
        if self.bias is not None:
            blocks = [block - self.bias.first for block in self.blocks]
            found[self.bias.name] = {"axis": 0, "outer": self.bias.blocks, "inner": 1, "blocks": blocks}
        return found


class _Unknown(Exception):
    """What an operation does to numbers is not known."""


def rows_of_values(analysis: Analysis, value: AxisRef) -> tuple[Stream, Rows] | None:
    """The stream of values that are a part of what a linear map gives, and the rows that write them.

    Args:
        analysis: the streams.
        value: what attention mixes, a head's channels being the axis.

    Returns:
        None if they are no such part, or the rows are seen by others.
    """
    part = next((node for node in _backwards(value[0]) if name_of(node) in CUTS), None)
    made = next((node for node in _backwards(value[0]) if name_of(node) in LINEAR_FORMS), None)
    if part is None or made is None or part not in analysis.data:
        return None
    stream = analysis.grow(value, ends={part})
    places = [place for node, place in stream.members if node is part]
    if len(places) != 1:
        return None
    try:
        weight, axis, vector, rows = written_by(analysis, made)
        numbers = torch.arange(rows).expand(shape_of(made))
        size = places[0].size
        blocks = _blocks(_at(analysis, part, {made: numbers}), places[0])
        if rows % size or _seen(analysis, made, numbers, part, size, blocks):
            return None
        found = _bias(analysis, vector, made, size, blocks) if vector is not None else None
    except (Unfoldable, _Unknown):
        return None
    return stream, Rows(weight, axis, found, size, rows // size, blocks, made)


def _bias(analysis: Analysis, vector: fx.Node, made: fx.Node, size: int, blocks: tuple[int, ...]) -> Bias:
    """The stored vector that the blocks have their bias of: the whole, or one of several that are joined to it.

    Raises:
        Unfoldable: it is not stored.
        _Unknown: they have it of several.
    """
    parts: Any = vector.args[0] if name_of(vector) in CONCATENATIONS else [vector]
    tensors = [_stored_behind(part) for part in parts]
    first = 0
    for part, tensor in zip(parts, tensors, strict=True):
        length = int(shape_of(part)[0])
        within = first <= min(blocks) * size and (max(blocks) + 1) * size <= first + length
        # Joined twice, it would be the bias of other rows, too.
        if within and first % size == 0 and length % size == 0 and tensors.count(tensor) == 1:
            return Bias(stored_vector(analysis, part, made), length // size, first // size)
        first += length
    raise _Unknown


def _stored_behind(node: fx.Node) -> fx.Node:
    while name_of(node) in STORED:
        node = node.args[0]  # type: ignore[assignment]
    return node


def only_in(analysis: Analysis, rows: Rows, found: list[Rows]) -> bool:
    """Whether all who read the weight and the bias are linear maps of which the same rows write values."""
    alike = {one.node for one in found if one.recipe == rows.recipe}
    for node, parameter in analysis.graph.parameters.items():
        if parameter.name not in rows.edits:
            continue
        users = set(readers(node, STORED))
        if parameter.name != rows.weight:  # a bias may be joined with those of the other rows
            for joined in [user for user in users if name_of(user) in CONCATENATIONS]:
                users = users - {joined} | set(readers(joined))
        if not users <= alike or len(parameter.aliases) > 1:
            return False
    return True


def _backwards(node: Any) -> Iterator[fx.Node]:
    """A value, and what it is moved from, as far as it is."""
    while isinstance(node, fx.Node):
        yield node
        if name_of(node) in CONCATENATIONS:
            # A cache that holds nothing yet is an empty vector, which torch passes over.
            parts = [one for one in node.args[0] if shape_of(one) != (0,)]  # type: ignore[union-attr]
            node = parts[0] if len(parts) == 1 else None
        else:
            node = node.args[0] if name_of(node) in PASSED and node.args else None


def _at(analysis: Analysis, node: fx.Node, known: dict[fx.Node, Any]) -> Tensor:
    """The numbers at a value, of those that are known where it comes from."""
    if node not in known:
        before = node.args[0]
        if not isinstance(before, fx.Node):
            raise _Unknown
        _at(analysis, before, known)
        known[node] = _moved(analysis, node, known)
    found: Tensor = known[node]
    return found


def _moved(analysis: Analysis, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What an operation makes of numbers."""
    if name_of(node) in SAME:
        if not is_float(node):
            raise _Unknown  # integers are rounded
        return known[node.args[0]]  # type: ignore[index]  # a cast would round them

    def value(argument: fx.Node) -> Any:
        if argument in known:
            return known[argument]
        while name_of(argument) in SAME:
            argument = argument.args[0]  # type: ignore[assignment]
        parameter = analysis.graph.parameters.get(argument)
        constant = parameter.value if parameter is not None else None
        if constant is None or constant.is_floating_point():
            raise _Unknown
        return constant

    arguments: Any
    arguments, named = fx.node.map_arg((node.args, node.kwargs), value)
    target: Any = operator.getitem if name_of(node) == GETITEM else node.target
    try:
        return target(*arguments, **named)
    except Exception as error:  # an operation that cannot be run on integers
        raise _Unknown from error


def _blocks(numbers: Tensor, place: ChannelAxis) -> tuple[int, ...]:
    """Which blocks of rows the channels at a place are: each a block, in order.

    Raises:
        _Unknown: they are not.
    """
    shape = numbers.shape
    view = numbers.reshape(*shape[: place.dim], place.outer, place.size, place.inner, *shape[place.dim + 1 :])
    heads = view.movedim(place.dim + 1, -1).reshape(-1, place.size)
    if not torch.equal(heads, heads[:, :1] + torch.arange(place.size)) or bool((heads[:, 0] % place.size).any()):
        raise _Unknown
    return tuple((heads[:, 0] // place.size).unique().tolist())


def _seen(
    analysis: Analysis, made: fx.Node, numbers: Tensor, part: fx.Node, size: int, blocks: tuple[int, ...]
) -> bool:
    """Whether anybody reads the rows past ``part``."""
    ours = torch.tensor(blocks)
    known: dict[fx.Node, Any] = {made: numbers}
    work = [made]
    while work:
        node = work.pop()
        users = list(readers(node))
        passing = [
            user
            for user in users
            if name_of(user) in PASSED and user.args[0] is node and user.all_input_nodes.count(node) == 1
        ]
        ends = len(passing) < len(users) or node in analysis.graph.exits or node in analysis.graph.outputs
        held = known[node] if isinstance(known[node], (tuple, list)) else (known[node],)
        if ends and any(bool(torch.isin(one // size, ours).any()) for one in held):
            return True
        for user in passing:
            if user is not part:
                known[user] = _moved(analysis, user, known)
                work.append(user)
    return False
