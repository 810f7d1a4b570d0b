"""A norm's weight and bias move into the linear maps that read it, and stay as ones and zeros.

W (g * n + b) + c = (W diag(g)) n + (W b + c) for the normalised value n; who may read it says `readers`. The norm keeps
its parameters, so that names and shapes in the checkpoint stay (invariant I3).
"""

from __future__ import annotations

from typing import Any

from normconvert.analysis.channel_axes import ChannelAxis
from normconvert.analysis.norms import Norm
from normconvert.analysis.streams import Analysis, described
from normconvert.rewrites.readers import Reader, Unfoldable, readers_of

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
            readers, _ = readers_of(analysis, calls, parts=True)
        except Unfoldable as kept:
            notes.append(f"{described(path)} keeps its weight and bias: {kept}")
            continue
        for reader in readers:
            axis = reading(reader)
            if bias is not None:
                row = product(reader, reader.weight, f"{path}.{bias}")
                # In front of what is there: where the reader writes into a mean-free stream, P(c + W b) is wanted, not
                # Pc + W b.
                tensors[str(reader.bias)] = [row, *tensors.get(str(reader.bias), [])]
            if weight is not None:
                row = {"op": "scale", "by": f"{path}.{weight}", **axis, "offset": settings["offset"]}
                tensors[reader.weight] = [row, *tensors.get(reader.weight, [])]
        if weight is not None:
            tensors[f"{path}.{weight}"] = [{"op": "fill", "value": 1.0 - settings["offset"]}]
        if bias is not None:
            tensors[f"{path}.{bias}"] = [{"op": "fill", "value": 0.0}]
    return notes


def along(place: ChannelAxis) -> dict[str, Any]:
    """The keys of an edit that say where the channels are."""
    row: dict[str, Any] = {"axis": place.dim}
    return row if place.whole else row | {"outer": int(place.outer), "inner": int(place.inner)}


def reading(reader: Reader) -> dict[str, Any]:
    """The keys of an edit that say where a linear map reads the channels in its stored tensor."""
    return along(reader.place) | ({"part": [reader.out, *reader.rows]} if reader.rows else {})


def product(reader: Reader, weight: str, vector: str) -> dict[str, Any]:
    """The edit that moves a norm's bias through a linear map into the map's own."""
    row = {"op": "add_product", "weight": weight, "by": vector, **along(reader.place)}
    row |= {"of": [reader.out, *reader.rows]} if reader.rows else {}
    return row | ({"part": [0, *reader.bias_rows]} if reader.bias_rows else {})


__all__ = ["along", "fold_norms", "product", "reading"]
