"""A norm's weight and bias move into the linear maps that read it.

W (g * n + b) + c = (W diag(g)) n + (W b + c) for the normalised value n: exact if every reader of the norm is such a
map with a weight of its own, and, where the norm has a bias, a bias of its own. The norm keeps its parameters, as
ones and zeros, so that names and shapes in the checkpoint stay (invariant I3).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..channels import name_of, terms_of
from ..norms import COPIES, MOVES, Norm
from ..places import Place, carry_back, shape_of
from ..streams import Analysis, Leak, described, operation

Edits = dict[str, list[dict[str, Any]]]


def fold_norms(analysis: Analysis, groups: list[list[Norm]], tensors: Edits) -> list[str]:
    """Add the edits that fold each norm (a group: all calls of one module) to ``tensors``; say which stay as they are.

    Returns:
        One sentence for each norm that keeps its weight and bias.
    """
    notes = []
    for calls in groups:
        settings = calls[0].module or {}
        path, weight, bias = calls[0].path, settings.get("weight"), settings.get("bias")
        if weight is None and bias is None:
            continue
        try:
            readers = [reader for call in calls for reader in _readers(analysis, call)]
            if bias is not None and any(reader_bias is None for _, _, reader_bias in readers):
                raise _Kept("a linear map that reads it has no bias to take the norm's")
            names = [name for name, _, _ in readers]
            if len(set(names)) != len(names):
                raise _Kept("one linear map reads it twice")
        except _Kept as kept:
            notes.append(f"{described(path)} keeps its weight and bias: {kept}")
            continue
        for name, axis, reader_bias in readers:
            if bias is not None:
                row = {"op": "add_product", "weight": name, "by": f"{path}.{bias}", "axis": axis}
                tensors[str(reader_bias)] = [row, *tensors.get(str(reader_bias), [])]
            if weight is not None:
                row = {"op": "scale", "by": f"{path}.{weight}", "axis": axis, "offset": settings["offset"]}
                tensors[name] = [row, *tensors.get(name, [])]
        if weight is not None:
            tensors[f"{path}.{weight}"] = [{"op": "fill", "value": 1.0 - settings["offset"]}]
        if bias is not None:
            tensors[f"{path}.{bias}"] = [{"op": "fill", "value": 0.0}]
    return notes


class _Kept(Exception):
    """Why a norm keeps its weight and bias."""


def _readers(analysis: Analysis, norm: Norm) -> list[tuple[str, int, str | None]]:
    """(weight name, its input dimension, bias name) of every linear map that reads the norm."""
    assert norm.place is not None
    start = (norm.output, norm.place)
    stream = analysis.grow(start)
    if stream.norms:
        raise _Kept(f"the norm {described(stream.norms[0][0].path)} reads it")
    for spot, made in stream.members.items():
        if spot != start and (made.how != "sum" or made.constant):
            raise _Kept(f"it is added to {made.reason or 'other values'}")
    if not stream.leaks:
        raise _Kept("nothing reads it")
    return [_reader(analysis, leak) for leak in stream.leaks]


def _reader(analysis: Analysis, leak: Leak) -> tuple[str, int, str | None]:
    reader, (value, place) = leak.reader, leak.spot
    name = name_of(reader)
    last = place.whole and place.dim == len(shape_of(value)) - 1
    if leak.code != "linear" or not last or reader.kwargs:
        raise _Kept(leak.reason)
    args = list(reader.args)
    bias = None
    if name == "aten.addmm" and args[1] is value:
        bias, weight = args[0], args[2]
    elif name == "aten.linear" and args[0] is value:
        weight, bias = args[1], args[2] if len(args) > 2 else None
    elif name in ("aten.mm", "aten.matmul") and args[0] is value:
        weight = args[1]
    else:
        raise _Kept(leak.reason)
    assert isinstance(weight, fx.Node)
    if len(shape_of(weight)) != 2:
        raise _Kept(f"{operation(reader)} is no plain linear map")
    at = Place(1 if name == "aten.linear" else 0, place.size)
    weight_name, axis = _parameter(analysis, weight, at, reader)
    bias_name = None
    if isinstance(bias, fx.Node):
        bias_name, _ = _parameter(analysis, bias, Place(0, int(shape_of(bias)[0])), reader)
        if len(shape_of(bias)) != 1:
            raise _Kept(f"{operation(reader)} has a bias that is no vector")
    return weight_name, axis, bias_name


def _parameter(analysis: Analysis, node: fx.Node, place: Place, reader: fx.Node) -> tuple[str, int]:
    """The stored parameter behind an operand, read by nobody else, and the dimension that ``place`` is there."""
    user = reader
    while True:
        others = [u for u in node.users if u is not user and not name_of(u).startswith("aten._assert")]
        if others:
            raise _Kept(f"{operation(others[0])} reads the weight of {operation(reader)} too")
        parameter = analysis.graph.parameters.get(node)
        if parameter is not None:
            if not parameter.stored or len(parameter.aliases) > 1 or not place.whole:
                raise _Kept(f"the weight of {operation(reader)} is tied or not stored")
            return parameter.name, place.dim
        terms = terms_of(node)
        back = None
        if (
            terms is not None
            and len(terms) == 1
            and len(terms[0]) == 1
            and name_of(node) in MOVES | COPIES | {"aten.t"}
        ):
            back = carry_back(terms[0][0], place, node)
        if terms is None or back is None:
            raise _Kept(f"the weight of {operation(reader)} is computed")
        user, node, place = node, terms[0][0].node, back


__all__ = ["fold_norms"]
