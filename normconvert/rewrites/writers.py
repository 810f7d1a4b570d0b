"""What writes into a stream takes the stream's change of basis: centring is P, compressing is B.

P(Wx + b) = (PW)x + Pb, and likewise for any linear map on the channels: every stored tensor that writes into a stream
takes it, and a layer scale gamma * (Wx + b) = (diag(gamma) W)x + gamma b moves into its writer first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from normconvert.analysis.streams import Analysis, AxisRef
from normconvert.rewrites.centring import Centring
from normconvert.rewrites.fold import along
from normconvert.rewrites.ties import table_and_head
from normconvert.rewrites.untying import untie_head

Edits = dict[str, list[dict[str, Any]]]


def writer_edits(
    analysis: Analysis, centring: Centring, needed: Collection[AxisRef], change: Mapping[str, Any]
) -> tuple[Edits, dict[str, list[str]], dict[str, Any], list[str]]:
    """The edits of the stored tensors and layer scales among ``needed``.

    Args:
        analysis: the streams.
        centring: which tensors and scales may be changed, and how.
        needed: values of the streams.
        change: the edit, without its axis: ``{"op": "center"}`` or ``{"op": "compress", "basis": ...}``.

    Returns:
        Tensor edits, aliases of tied tensors, changes of the config, and sentences for the user.
    """
    tensors: Edits = {}
    aliases: dict[str, list[str]] = {}
    config: dict[str, Any] = {}
    notes: list[str] = []
    heads: set[str] = set()

    def edit(ref: AxisRef, name: str, **row: Any) -> None:
        rows = tensors.setdefault(name, [])
        # Two calls may ask for the same edit of one tensor, which must not be scaled twice.
        if row not in rows:
            rows.append(row)
        names = analysis.graph.parameters[ref[0]].aliases
        names = tuple(one for one in names if one not in heads or ref not in centring.untied)
        if len(names) > 1:
            aliases[name] = list(names)

    for ref in (s for s in centring.scales if s in needed):
        scale = centring.scales[ref]
        by = analysis.graph.parameters[scale.factor[0]].name
        for writer in scale.writers:
            name = analysis.graph.parameters[writer[0]].name
            # gamma before P: P diag(gamma) W is wanted, and diag(gamma) P W is not mean-free.
            edit(writer, name, op="scale", by=by, **along(writer[1]))
            edit(writer, name, **change, **along(writer[1]))
        edit(scale.factor, by, op="fill", value=1.0)
        if change["op"] == "compress":
            # The ones lie along the channels, of which there is one less.
            edit(scale.factor, by, op="drop", **along(scale.factor[1]))
    for ref in (s for stream in centring.usable for s in stream.members if s in needed):
        if ref in centring.untied:
            own, other = table_and_head(analysis.graph, ref[0])
            # The head keeps the table as it was: edits read the values of the source, whatever their order.
            if other not in heads:
                notes.append(untie_head(analysis.graph, own, other, tensors, config))
                heads.add(other)
            edit(ref, own, **change, **along(ref[1]))
        elif ref in centring.editable:
            edit(ref, analysis.graph.parameters[ref[0]].name, **change, **along(ref[1]))
    return tensors, aliases, config, notes
