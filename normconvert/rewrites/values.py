"""Linear maps with nothing but channel-transparent operations between: values of attention, and what reads them.

What V writes and O alone reads may be stored in any other basis A: O (V x) = (O A') (A V x) for an orthogonal A. Where
the operations between split the channels into heads, A is one map for each head's, and with fewer heads of values than
of queries the same follows to each reader's place. The pair is found by what reads the values, whatever modules are
called. (QuaRot, arXiv 2404.00456, section 4; SpinQuant, arXiv 2405.16406, calls it R2.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.analysis.streams import Analysis, AxisRef, Stream
from normconvert.rewrites.fold import along
from normconvert.rewrites.fused_values import Rows, only_in, rows_of_values
from normconvert.rewrites.readers import LINEAR_FORMS, STORED, Reader, Unfoldable, linear_reader
from normconvert.rewrites.writers import Edits
from normconvert.tracing.operations import name_of, readers

CACHES = ("cache", "past_key_values")
"""How outputs are called that hold what later calls are given again."""


@dataclass(frozen=True)
class Pair:
    """What is written and read.

    Attributes:
        stream: the values.
        writers: the stored tensors that write them, as a whole.
        readers: the linear maps that read them.
        cached: a call returns them for later ones.
        rows: in place of writers, a part of a tensor that writes them.
    """

    stream: Stream
    writers: tuple[AxisRef, ...]
    readers: tuple[Reader, ...]
    cached: bool
    rows: Rows | None = None


def value_pairs(analysis: Analysis, taken: Collection[AxisRef] | None = None) -> list[Pair]:
    """All pairs of a graph whose tensors nobody else reads.

    Args:
        analysis: the streams.
        taken: values that are in another basis already; None: all that are of streams with norms.
    """
    taken = analysis.stream_of if taken is None else taken
    found: list[Pair] = []
    seen: set[AxisRef] = set()
    for start in _starts(analysis):
        if start in seen or start in taken:
            continue
        pair = _pair(analysis, analysis.grow(start))
        if pair is None and (fused := rows_of_values(analysis, start)) is not None:
            pair = _pair(analysis, *fused)
        if pair is not None and not any(ref in taken for ref in pair.stream.members):
            seen |= pair.stream.members.keys()
            found.append(pair)
    return _all_alone(analysis, found)


def product_pairs(analysis: Analysis) -> list[Pair]:
    """Linear maps that read products, with those whose results are one factor: a number by channel passes between.

    The other factor is whatever it is: O (g * U x) = (O diag(s)) (g * (diag(s)^-1 U) x), for gates say. No rotation
    passes there, so these pairs are for :mod:`normconvert.rewrites.anatomy` alone.
    """
    found = []
    for node in analysis.graph.nodes:
        factors = [one for one in node.args if isinstance(one, fx.Node) and one in analysis.data]
        if name_of(node) != "aten.mul" or len(set(factors)) != 2:
            continue
        product = analysis.grow(_last(node), ends=(node,))
        maps = _maps_that_read(analysis, product)
        if not maps or any(made.kind != "sum" or made.rest for made in product.members.values()):
            continue
        for stream in (analysis.grow(_last(factor)) for factor in factors if shape_of(factor)):
            writers = [ref for ref, made in stream.members.items() if made.kind == "parameter"]
            alone = not stream.norms and all(leak.reader is node for leak in stream.leaks)
            if writers and alone and _is_plain(stream) and stream.size == product.size:
                found.append(Pair(stream, tuple(writers), maps, cached=False))
    return _all_alone(analysis, found)


def _all_alone(analysis: Analysis, found: list[Pair]) -> list[Pair]:
    """Those whose tensors nobody else reads: several calls share them, so each round leaves fewer, or is the last."""
    while True:
        kept = [pair for pair in found if _alone(analysis, pair, found)]
        if len(kept) == len(found):
            return found
        found = kept


def _maps_that_read(analysis: Analysis, stream: Stream) -> tuple[Reader, ...]:
    """The linear maps that read a stream; none if something else does, too."""
    try:
        return () if stream.norms else tuple(linear_reader(analysis, leak) for leak in stream.leaks)
    except Unfoldable:
        return ()


def _is_plain(stream: Stream) -> bool:
    """Whether parameters alone write into it."""
    return all(made.kind == "parameter" or (made.kind == "sum" and not made.rest) for made in stream.members.values())


def _starts(analysis: Analysis) -> Iterator[AxisRef]:
    """Values of heads, which a product of two values mixes over tokens; then what a linear map gives as a whole."""
    wholes = []
    for node in analysis.graph.nodes:
        value = None
        if name_of(node) == "aten.scaled_dot_product_attention":
            value = node.args[2]
        elif name_of(node) in ("aten.matmul", "aten.bmm") and node.args[1] in analysis.data:
            value = node.args[1]
        elif name_of(node) in LINEAR_FORMS and node in analysis.data and name_of(node) in ("aten.linear", "aten.addmm"):
            wholes.append(node)
        if isinstance(value, fx.Node):
            yield _last(value)
    yield from map(_last, wholes)


def _last(node: fx.Node) -> AxisRef:
    shape = shape_of(node)
    return node, ChannelAxis(len(shape) - 1, shape[-1])


def _pair(analysis: Analysis, stream: Stream, rows: Rows | None = None) -> Pair | None:
    """A stream that linear maps alone write and read."""
    if not isinstance(stream.size, int) or stream.size < 2 or stream.norms:
        return None
    cached = False
    found: list[Reader] = []
    for leak in stream.leaks:
        names = analysis.graph.outputs.get(leak.ref[0], ())
        if leak.code == "returned" and names and all(name.split(".")[0] in CACHES for name in names):
            cached = True
            continue
        try:
            found.append(linear_reader(analysis, leak))
        except Unfoldable:
            return None
    writers = [ref for ref, made in stream.members.items() if made.kind == "parameter"]
    if not _is_plain(stream) or not found or bool(writers) is (rows is not None):
        return None
    return Pair(stream, tuple(writers), tuple(found), cached, rows)


def _alone(analysis: Analysis, pair: Pair, pairs: list[Pair]) -> bool:
    """Whether the tensors of a pair are read in no other way than by this or another pair."""
    members = {ref for one in pairs for ref in one.stream.members}
    by_weight: dict[str, set[fx.Node]] = {}
    ways: dict[str, set[ChannelAxis]] = {}
    for one in pairs:
        for reader in one.readers:
            by_weight.setdefault(reader.weight, set()).update(reader.nodes)
            ways.setdefault(reader.weight, set()).add(reader.place)
        for ref in one.writers:
            # A tensor that writes one pair and reads another is edited along two axes, which do not mind each other.
            ways.setdefault(f"{analysis.graph.parameters[ref[0]].name} as a writer", set()).add(ref[1])
    if pair.rows is not None and not only_in(analysis, pair.rows, [one.rows for one in pairs if one.rows is not None]):
        return False
    for ref in pair.writers:
        parameter = analysis.graph.parameters[ref[0]]
        if len(parameter.aliases) > 1 or len(ways[f"{parameter.name} as a writer"]) > 1:
            return False
        if next(analysis.other_readers(ref, members.__contains__, norms_too=True), None) is not None:
            return False
    nodes = {parameter.name: node for node, parameter in analysis.graph.parameters.items()}
    for reader in pair.readers:
        node = nodes[reader.weight]
        if len(analysis.graph.parameters[node].aliases) > 1 or len(ways[reader.weight]) > 1:
            return False
        if any(user not in by_weight[reader.weight] for user in readers(node, STORED)):
            return False
    return True


def rotate_values(analysis: Analysis, pairs: list[Pair], change: dict[str, Any], tensors: Edits) -> None:
    """Add the edits that give each pair another basis, one for all heads of a size.

    Args:
        analysis: the streams.
        pairs: of :func:`value_pairs`.
        change: the edit without its axis.
        tensors: tensor -> its edits so far, which stay before these.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for pair in pairs:
        for ref in pair.writers:
            rows[analysis.graph.parameters[ref[0]].name, "writes"] = {**change, **along(ref[1])}
        if pair.rows is not None:
            for name, place in pair.rows.edits.items():
                rows[name, "writes"] = {**change, **place}
        for reader in pair.readers:
            rows[reader.weight, "reads"] = {**change, **along(reader.place)}
    for (name, _), row in rows.items():
        tensors.setdefault(name, []).append(row)
