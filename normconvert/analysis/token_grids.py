"""Which values are tokens laid out as a grid, by a convolution, and where they carry its rows and columns.

A convolution's result has rows and columns as dimensions of their own. From there on both are followed as channels
are: through views that merge them into one dimension of tokens, cut them into windows or split them again; through
whatever treats every token alike; through attention, whose result has a token for each query. A concatenation that puts
others before them (class tokens, registers) gives the grid a prefix, a slice may take it off again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from normconvert.analysis.axis_rules import broadcast, dims_argument, kept_dims
from normconvert.analysis.channel_axes import ChannelAxis, Operand, carry_forward, shape_of
from normconvert.analysis.op_table import ACTIVATIONS, POINTWISE, terms_of
from normconvert.tracing.operations import (
    ATTENTION,
    CONCATENATIONS,
    CONVOLUTIONS,
    LIKE_ANOTHER,
    SOFTMAX,
    argument,
    name_of,
)

NORMS = {"aten.layer_norm", "aten.rms_norm"}


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of a grid, and where a value carries them.

    Attributes:
        height: rows, of the whole grid or of each window.
        width: columns.
        prefix: tokens before those of the grid, in the same dimension.
        places: of the rows and of the columns; with a prefix, of all tokens, which are a whole dimension.
    """

    height: int
    width: int
    prefix: int
    places: tuple[ChannelAxis, ...]

    @property
    def tokens(self) -> int:
        """How many, those of the prefix included."""
        return self.prefix + self.height * self.width

    def fills(self, dim: int, value: fx.Node) -> bool:
        """Whether dimension ``dim`` is these tokens, row by row, and nothing else."""
        return shape_of(value)[dim] == self.tokens and self.places == _filling(
            dim, self.height, self.width, self.prefix
        )


Grids = Mapping[TokenGrid, frozenset[fx.Node]]
"""The grids that a value is laid out as -> the convolutions that laid it out."""


def find_grids(nodes: tuple[fx.Node, ...]) -> dict[fx.Node, Grids]:
    """The grids of all values of a graph; a value without any is left out.

    Args:
        nodes: in execution order.
    """
    found: dict[fx.Node, Grids] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        grids: dict[TokenGrid, frozenset[fx.Node]] = dict.fromkeys(_laid_out(node), frozenset({node}))
        for operand in _operands(node):
            for grid, sources in found.get(operand.node, {}).items():
                new = _carried(grid, operand, node)
                if new is not None:
                    grids[new] = grids.get(new, frozenset()) | sources
        if grids:
            found[node] = grids
    return found


def _filling(dim: int, height: int, width: int, prefix: int) -> tuple[ChannelAxis, ...]:
    """The places of tokens that are a whole dimension."""
    if prefix:
        return (ChannelAxis(dim, prefix + height * width),)
    return ChannelAxis(dim, height, 1, width), ChannelAxis(dim, width, height, 1)


def _laid_out(node: fx.Node) -> Iterator[TokenGrid]:
    """The grid that a convolution makes of an image."""
    shape = shape_of(node)
    if name_of(node) in CONVOLUTIONS and len(shape) == 4 and isinstance(shape[2], int) and isinstance(shape[3], int):
        yield TokenGrid(shape[2], shape[3], 0, (ChannelAxis(2, shape[2]), ChannelAxis(3, shape[3])))


def _operands(node: fx.Node) -> Iterator[Operand]:
    """The operands whose tokens are those of the result, place by place."""
    name = name_of(node)
    if name == ATTENTION:
        query = node.args[0]
        assert isinstance(query, fx.Node)
        yield Operand(query, kept_dims(query, [-1]))
    elif name in CONCATENATIONS or name == "aten.slice":
        yield from (Operand(x, kept_dims(x)) for x in node.all_input_nodes if shape_of(x))
    elif name in NORMS:
        x, axes = node.args[0], node.args[1]
        assert isinstance(x, fx.Node)
        assert isinstance(axes, (list, tuple))
        yield Operand(x, kept_dims(x, range(-len(axes), 0)))
    elif name in SOFTMAX:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        yield Operand(x, kept_dims(x, dims_argument(argument(node, 1, "dim"), len(shape_of(x)))))
    elif name in POINTWISE or name in ACTIVATIONS:
        values = node.all_input_nodes[:1] if name in LIKE_ANOTHER else node.all_input_nodes
        yield from (Operand(x, broadcast(x, node)) for x in values if shape_of(x))
    else:
        yield from (operand for term in terms_of(node) or () for operand in term)


def _carried(grid: TokenGrid, operand: Operand, node: fx.Node) -> TokenGrid | None:
    """The grid as the result carries it; None if it does not."""
    name = name_of(node)
    if name in CONCATENATIONS:
        return _with_prefix(grid, operand.node, node)
    if name == "aten.slice":
        return _without_prefix(grid, operand.node, node)
    if grid.prefix:
        place = carry_forward(operand, grid.places[0], node)
        return None if place is None else replace(grid, places=(place,))
    rows, columns = (_carried_part(operand, place, node) for place in grid.places)
    if rows is None or columns is None:
        return None
    return TokenGrid(rows.size, columns.size, 0, (rows, columns))


def _carried_part(operand: Operand, place: ChannelAxis, node: fx.Node) -> ChannelAxis | None:
    """Where rows or columns arrive; of those that a view cuts into windows, the places within a window."""
    for size in range(place.size, 1, -1) if operand.view else (place.size,):
        if place.size % size == 0:
            part = replace(place, size=size, outer=place.outer * (place.size // size))
            found = carry_forward(operand, part, node)
            if found is not None:
                return found
    return None


def _with_prefix(grid: TokenGrid, value: fx.Node, node: fx.Node) -> TokenGrid | None:
    """The grid in a concatenation: other tokens may stand before it, and none behind."""
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    if all(place.dim != dim for place in grid.places):
        return grid
    parts = argument(node, 0, "tensors")
    before = [shape_of(part)[dim] for part in parts[:-1]]
    if value is not parts[-1] or not grid.fills(dim, value) or not all(isinstance(n, int) for n in before):
        return None
    prefix = grid.prefix + sum(before)
    return TokenGrid(grid.height, grid.width, prefix, _filling(dim, grid.height, grid.width, prefix))


def _without_prefix(grid: TokenGrid, value: fx.Node, node: fx.Node) -> TokenGrid | None:
    """The grid in a slice, which may take tokens away before it."""
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    old, new = shape_of(value)[dim], shape_of(node)[dim]
    if old == new or all(place.dim != dim for place in grid.places):
        return grid
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    known = all(isinstance(n, int) for n in (start, old, new)) and step == 1
    if not known or not grid.fills(dim, value) or start % old + new != old or start % old > grid.prefix:
        return None
    prefix = grid.prefix - start % old
    return TokenGrid(grid.height, grid.width, prefix, _filling(dim, grid.height, grid.width, prefix))
