"""Who reads a norm's result: the linear maps into which its weight and bias can move.

W (g * n + b) + c = (W diag(g)) n + (W b + c) for the normalised value n: exact if every reader of the norm is a linear
map with a stored weight that nobody else reads, and, where the norm has a bias b, if what stands between leaves b as it
is (a zero padding does not) and the map has, or can be given, a bias of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from normconvert.analysis.channel_axes import ChannelAxis, carry_back, shape_of
from normconvert.analysis.moving_rules import cut_of
from normconvert.analysis.norms import Norm
from normconvert.analysis.op_table import terms_of
from normconvert.analysis.streams import Analysis, AxisRef, Leak, described, operation
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.operations import (
    ALIASES,
    CONVOLUTIONS,
    COPIES,
    EMBEDDING,
    GETITEM,
    GROUPED,
    MOVES,
    SPLITS,
    all_are,
    argument,
    keeps_constants,
    name_of,
    readers,
)

Rows = tuple[int, int]
"""Consecutive results of a linear map: the first, and the one behind the last."""


@dataclass(frozen=True)
class Reader:
    """A linear map that reads a norm.

    Attributes:
        nodes: its calls.
        weight: the stored tensor.
        place: where the norm's channels are in it.
        out: its dimension of the results.
        rows: the part of them that this map has, (start, stop), where others have the rest; None: it has all.
        bias: the bias that the norm's may move into; None if the norm has none, or there is none yet.
        bias_rows: the part of that.
        module: the module that can be given a bias; empty if ``bias`` is there, or not needed.
    """

    nodes: frozenset[fx.Node]
    weight: str
    place: ChannelAxis
    out: int
    bias: str | None
    module: str = ""
    rows: Rows | None = None
    bias_rows: Rows | None = None


class Unfoldable(Exception):
    """Why a norm cannot move into its readers."""


class Returned(Unfoldable):
    """The model returns what it gives."""


@dataclass(frozen=True)
class _Form:
    """The arguments of a linear map, and the dimensions of its weight: x, weight, bias, in, out."""

    x: int
    weight: int
    bias: int | None
    dim: int
    out: int


BY_EXPERT = GROUPED | {"aten.bmm"}
"""Linear maps with several matrices in one tensor, of which each place in another dimension takes its own."""

LINEAR_FORMS = {
    "aten.linear": _Form(0, 1, 2, 1, 0),
    "aten.addmm": _Form(1, 2, 0, 0, 1),
    "aten.mm": _Form(0, 1, None, 0, 1),
    "aten.matmul": _Form(0, 1, None, 0, 1),
    **dict.fromkeys(CONVOLUTIONS, _Form(0, 1, 2, 1, 0)),
    **dict.fromkeys(BY_EXPERT, _Form(0, 1, None, 1, 2)),
}

STORED = MOVES | COPIES | ALIASES
"""What may stand between a stored weight and the map that uses it."""


def readers_of(
    analysis: Analysis,
    calls: list[Norm],
    untied: dict[str, str] | None = None,
    new_biases: bool = False,
    bias_stays: bool = False,
    through: Collection[str] = (),
    parts: bool = False,
) -> tuple[list[Reader], set[AxisRef]]:
    """The linear maps that read a norm, one entry for each weight or part of one, and the values between.

    Args:
        analysis: the streams.
        calls: all calls of one norm.
        untied: tied table -> name that the reading side has once it is untied.
        new_biases: a reader may be given a bias.
        bias_stays: the norm's bias does not move.
        through: codes of leaks that are passed over, since what they return may change.
        parts: a map may have a part of a stored tensor's rows, as those of queries, keys and values in one tensor.

    Raises:
        Unfoldable: something else reads it, too.
    """
    module = calls[0].module or {}
    has_bias = module.get("bias") is not None and not bias_stays
    starts: list[AxisRef] = [(call.output, call.place) for call in calls if call.place is not None]
    # What is returned in another basis may be given to another call, which reads it in that.
    starts += _given_again(analysis, starts) if "returned" in through and starts else []
    values, leaks = values_behind(analysis, starts, has_bias)
    leaks = [leak for leak in leaks if leak.code not in through]
    if not leaks:
        raise Unfoldable("nothing but the model's outputs reads it" if "returned" in through else "nothing reads it")
    found: dict[tuple[str, Rows | None], list[Reader]] = {}
    for leak in leaks:
        reader = _reader(analysis, leak, has_bias, untied or {}, new_biases, parts)
        found.setdefault((reader.weight, reader.rows), []).append(reader)
    result = []
    apart = set((untied or {}).values())
    for same in found.values():
        reader = replace(same[0], nodes=frozenset().union(*(r.nodes for r in same)))
        name = operation(next(iter(same[0].nodes)))
        if any(replace(other, nodes=reader.nodes) != reader for other in same):
            raise Unfoldable(f"{name} reads it in several ways")
        for role, tensor, out, rows in (
            ("weight", reader.weight, reader.out, reader.rows),
            ("bias", reader.bias, 0, reader.bias_rows),
        ):
            if tensor is not None:
                part = _Part(tensor, out, rows)
                _check_users(analysis, part, f"{role} of {name}", reader.nodes, apart=tensor in apart)
        result.append(reader)
    biases = [(reader.bias, reader.bias_rows) for reader in result if reader.bias is not None]
    if len(set(biases)) != len(biases):
        raise Unfoldable("two linear maps that read it share a bias")
    return result, values


def _given_again(analysis: Analysis, starts: list[AxisRef]) -> list[AxisRef]:
    """Values from outside that are read as these alone: what an earlier call has returned of them."""
    graph = analysis.graph
    weights = {weight_of(graph, leak) for leak in values_behind(analysis, starts, False)[1]}
    found: list[AxisRef] = []
    for node in (node for node in graph.nodes if node in graph.outside):
        shape = shape_of(node)
        ref = (node, ChannelAxis(len(shape) - 1, shape[-1])) if shape else None
        if ref is None or ref[1].size != starts[0][1].size or ref in analysis.stream_of:
            continue
        try:
            leaks = values_behind(analysis, [ref], False)[1]
        except Unfoldable:
            continue
        read = [weight_of(graph, leak) for leak in leaks if leak.code not in ("returned", "features")]
        if read and None not in read and weights.issuperset(read):
            found.append(ref)
    return found


CUT = SPLITS | {"aten.slice", GETITEM}
"""What takes a part of a stored weight."""


def weight_of(graph: Graph, leak: Leak, through: Collection[str] = STORED) -> fx.Node | None:
    """The stored weight of the linear map that a reader is; None if it is none, or the weight is computed.

    Args:
        graph: the model.
        leak: the reader.
        through: what may stand between the stored tensor and the map.
    """
    form = LINEAR_FORMS.get(name_of(leak.reader))
    if leak.code != "linear" or form is None or leak.reader.kwargs or leak.reader.args[form.x] is not leak.ref[0]:
        return None
    weight: Any = leak.reader.args[form.weight]
    if sum(one is leak.ref[0] for one in leak.reader.all_input_nodes) != 1 or weight is leak.ref[0]:
        return None
    while isinstance(weight, fx.Node) and name_of(weight) in through:
        weight = weight.args[0]
    parameter = graph.parameters.get(weight) if isinstance(weight, fx.Node) else None
    return weight if parameter is not None and parameter.stored else None


def values_behind(analysis: Analysis, starts: list[AxisRef], has_bias: bool) -> tuple[set[AxisRef], list[Leak]]:
    """What is made of the norm's result alone, channel by channel, and what reads that."""
    values: set[AxisRef] = set()
    leaks: list[Leak] = []
    centred: AxisRef | None = None
    work = list(starts)
    while work:
        ref = work.pop()
        if ref in values:
            continue
        values.add(ref)
        for use in analysis.uses(ref):
            if use.norm is not None:
                raise Unfoldable(f"the norm {described(use.norm.path)} reads it")
            if use.leak is not None:
                leaks.append(use.leak)
            elif use.to is not None:
                # Zeros that join on the way (padding, a mask) have no b in them, and would be given W b behind the map.
                if has_bias and not keeps_constants(use.to[0]):
                    raise Unfoldable(f"{operation(use.to[0])} does not keep its bias as it is")
                work.append(use.to)
            else:
                centred = ref  # its mean goes to nobody, and all else is read, by a norm or without one
    if centred is not None:
        raise Unfoldable(f"something reads it without its mean in {described(module_path(centred[0]))}")
    for ref in values - set(starts):
        made = analysis.provenance(ref)
        # Where anything else joins the norm's result, the map would apply g to that, too.
        if made.kind != "sum" or made.rest or not set(made.parts) <= values:
            raise Unfoldable(f"{operation(ref[0])} adds it to {made.reason or 'other values'}")
    return values, leaks


def _reader(
    analysis: Analysis, leak: Leak, has_bias: bool, untied: dict[str, str], new_biases: bool, parts: bool
) -> Reader:
    node, (value, place) = leak.reader, leak.ref
    form = LINEAR_FORMS.get(name_of(node))
    # Keywords are beta and alpha of addmm, which would scale the bias and the weight after they are edited.
    if leak.code == "returned":
        raise Returned(leak.reason)
    if leak.code != "linear" or form is None or node.kwargs:
        raise Unfoldable(leak.reason)
    args = [*node.args, *[None] * 3]
    weight, bias = args[form.weight], args[form.bias] if form.bias is not None else None
    if args[form.x] is not value or not isinstance(weight, fx.Node):
        raise Unfoldable(leak.reason)
    convolution = name_of(node) in CONVOLUTIONS
    rank = len(shape_of(weight))
    batched = convolution and len(shape_of(value)) == rank
    plain = convolution or rank == (3 if name_of(node) in BY_EXPERT else 2)
    if place.dim != (int(batched) if convolution else len(shape_of(value)) - 1) or not plain:
        raise Unfoldable(f"{operation(node)} is no plain linear map")
    if has_bias and convolution and not _unpadded(node):
        raise Unfoldable(f"{operation(node)} pads with zeros, which a bias moved behind it would not be")
    at = ChannelAxis(form.dim, place.size, place.outer, place.inner)
    part, stored = _stored(analysis, weight, at, form.out, node, parts=parts)
    name, out = untied.get(part.name, part.name), part.out
    reader = Reader(frozenset([node]), name, stored, out, None, rows=part.rows)
    if not has_bias:
        return reader
    if isinstance(bias, fx.Node):
        if len(shape_of(bias)) != 1:
            raise Unfoldable(f"{operation(node)} has a bias that is no vector")
        vector, _ = _stored(analysis, bias, ChannelAxis(0, int(shape_of(bias)[0])), 0, node, parts=parts)
        return replace(reader, bias=vector.name, bias_rows=vector.rows)
    path = module_path(node)
    module = analysis.graph.modules.get(path)
    # Registered as None: the class knows of a bias, and was built without.
    absent = isinstance(module, nn.Module) and module._parameters.get("bias", 0) is None and name == f"{path}.weight"
    if not new_biases or not absent or (stored.dim, out) != (form.dim, form.out) or form.bias is None:
        raise Unfoldable(f"{operation(node)} has no bias to take the norm's")
    return replace(reader, module=path)


def linear_reader(analysis: Analysis, leak: Leak, *, parts: bool = False) -> Reader:
    """The linear map that a reader is, with a weight of its own, or ``parts`` of one.

    Raises:
        Unfoldable: it is none, or its weight is not stored.
    """
    return _reader(analysis, leak, False, {}, new_biases=False, parts=parts)


def written_by(analysis: Analysis, node: fx.Node) -> tuple[str, int, fx.Node | None, int]:
    """What a linear map's results are written by.

    Args:
        analysis: the streams.
        node: one of :data:`LINEAR_FORMS`.

    Returns:
        The weight, its dimension of the results, the bias if there is one (see :func:`stored_vector`), and how many
        results there are.

    Raises:
        Unfoldable: the weight is not stored.
    """
    form = LINEAR_FORMS[name_of(node)]
    args: list[Any] = [*node.args, *[None] * 3]
    weight, bias = args[form.weight], args[form.bias] if form.bias is not None else None
    if node.kwargs or not isinstance(weight, fx.Node) or len(shape_of(weight)) != 2:
        raise Unfoldable(f"{operation(node)} is no plain linear map")
    place = ChannelAxis(form.dim, int(shape_of(weight)[form.dim]))
    part, _ = _stored(analysis, weight, place, form.out, node)
    count = int(shape_of(weight)[form.out])
    if isinstance(bias, fx.Node) and tuple(shape_of(bias)) != (count,):
        raise Unfoldable(f"{operation(node)} has a bias that is no vector")
    return part.name, part.out, bias if isinstance(bias, fx.Node) else None, count


def stored_vector(analysis: Analysis, vector: fx.Node, reader: fx.Node) -> str:
    """The name of the stored tensor that a vector is.

    Raises:
        Unfoldable: it is none.
    """
    return _stored(analysis, vector, ChannelAxis(0, int(shape_of(vector)[0])), 0, reader)[0].name


def _unpadded(node: fx.Node) -> bool:
    padding = argument(node, 4, "padding", 0)
    return bool(padding == "valid") or all_are(padding, 0)


@dataclass(frozen=True)
class _Part:
    """A stored tensor, its dimension of the results, and which of them are meant; None: all."""

    name: str
    out: int
    rows: Rows | None


def _stored(
    analysis: Analysis, node: fx.Node, place: ChannelAxis, out: int, reader: fx.Node, *, parts: bool = False
) -> tuple[_Part, ChannelAxis]:
    """The stored tensor behind an operand, or ``parts`` of one, and where ``place`` is there."""
    count = int(shape_of(node)[out])
    first = 0
    while True:
        parameter = analysis.graph.parameters.get(node)
        if parameter is not None:
            if not parameter.stored:
                raise Unfoldable(f"the weight of {operation(reader)} is not stored")
            whole = count == shape_of(node)[out]
            return _Part(parameter.name, out, None if whole else (first, first + count)), place
        cut = cut_of(node) if parts else None
        if cut is not None and cut[1] == out:
            node, first = cut[0], first + cut[2]
            continue
        terms = terms_of(node) if name_of(node) in STORED else None
        if terms is None or len(terms) != 1 or len(terms[0]) != 1:
            raise Unfoldable(f"the weight of {operation(reader)} is computed")
        operand = terms[0][0]
        back = carry_back(operand, place, node)
        # Both dimensions have to be found, the one that g scales and the one that W b lies along.
        if not isinstance(back, ChannelAxis) or out not in operand.dims.values():
            raise Unfoldable(f"the weight of {operation(reader)} is computed")
        out = next(source for source, target in operand.dims.items() if target == out)
        node, place = operand.node, back


def _check_users(
    analysis: Analysis, part: _Part, described_as: str, allowed: frozenset[fx.Node], *, apart: bool
) -> None:
    """Refuse a tensor that anything but these readers uses; ``apart``, but for the embedding that it is untied from."""
    for node, parameter in analysis.graph.parameters.items():
        if part.name not in parameter.aliases:
            continue
        if len(parameter.aliases) > 1 and not apart:
            raise Unfoldable(f"the {described_as} is tied")
        for user in readers_of_rows(node, part.out, part.rows):
            if user not in allowed and not (apart and name_of(user) == EMBEDDING):
                raise Unfoldable(f"{operation(user)} reads the {described_as} too")


def readers_of_rows(value: fx.Node, dim: int, rows: Rows | None) -> Iterator[fx.Node]:
    """Who reads these rows (all), along ``dim``, of a stored tensor, whatever is moved or cut off on the way."""
    rows = rows or (0, int(shape_of(value)[dim]))
    for user in readers(value):
        name = name_of(user)
        if name in STORED and user.args[0] is value:
            terms = terms_of(user)
            at = terms[0][0].dims.get(dim) if terms is not None and len(terms) == 1 else None
            ways: Iterable[fx.Node] = [user] if at is None else readers_of_rows(user, at, rows)
        elif (name in SPLITS or name == "aten.slice") and user.args[0] is value:
            ways = _readers_of_parts(list(readers(user)) if name in SPLITS else [user], dim, rows)
        else:
            ways = [user]
        yield from ways


def _readers_of_parts(parts: list[fx.Node], dim: int, rows: Rows) -> Iterator[fx.Node]:
    """Who reads these rows in parts of a tensor; another part is none of theirs."""
    for part in parts:
        cut = cut_of(part)
        if cut is None or cut[1] != dim:
            yield part
            continue
        start, stop = cut[2], cut[2] + int(shape_of(part)[dim])
        if start < rows[1] and stop > rows[0]:
            yield from readers_of_rows(part, dim, (rows[0] - start, rows[1] - start))
