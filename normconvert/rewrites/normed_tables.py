"""A norm that reads rows of one table alone may write into a rotated stream: the table takes what the norm made of it.

For a row e such a norm gives g * n(e) + b, a vector like any other. With a number c >= sqrt(2) max|g| the vector
y = Q (g * n(e)) / c has mean(y^2) = r <= 1/2, and the row e' = y sqrt(eps / (1 - r)) has n(e') = y: the norm gives
c y + Q b for it, with the weight c and the bias Q b. A LayerNorm's n has no mean, and y is taken without its own, which
is nothing to the stream where all its norms are LayerNorms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from normconvert.analysis.norms import Norm
from normconvert.analysis.streams import Analysis, AxisRef, Stream, operation, spans
from normconvert.plan.vectors import Expression, minus, plus
from normconvert.rewrites.centring import can_untie
from normconvert.rewrites.ties import table_and_head
from normconvert.rewrites.untying import untie_head
from normconvert.rewrites.verdicts import misuse
from normconvert.rewrites.writers import Edits
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import ALIASES, COPIES, EMBEDDING, name_of

_SAME = COPIES | ALIASES | {EMBEDDING}
"""What may stand between a table and the norm."""


@dataclass(frozen=True)
class NormedTable:
    """A table whose rows one norm reads, and nobody else but an output head.

    Attributes:
        calls: all calls of the norm.
        name: of the table.
        head: the name that the head reads it by, if it is tied; else empty.
        outside: values that a call may give in place of rows.
    """

    calls: list[Norm]
    name: str
    head: str
    outside: tuple[AxisRef, ...]

    @property
    def results(self) -> list[AxisRef]:
        """What the norm gives."""
        return [(norm.result, norm.place) for norm in self.calls if norm.place is not None]

    def obstacle(self, analysis: Analysis, stream: Stream, members: Collection[AxisRef], past_norms: str) -> str:
        """Why the norm may not write into a stream that is rotated, with all else in ``members``; empty if it may.

        Args:
            analysis: the streams.
            stream: that it writes into.
            members: of all streams that are rotated.
            past_norms: what reads the stream and is no norm; empty if nothing does.
        """
        if not all(ref in members for ref in self.results):
            return "writes into what stays, too"
        for ref in (ref for ref in self.results if ref[0] not in analysis.data):
            # Of what no input changes (queries that are learnt, say) a stream does not follow who else reads it.
            if (reader := next(analysis.other_readers(ref, members.__contains__), None)) is not None:
                return f"gives what {operation(reader)} reads, too"
        if self.calls[0].centred and (other := next((n for n, _ in stream.norms if not n.centred), None)):
            return f"gives what has no mean, of which `{other.path}` would miss it"
        if self.calls[0].centred and past_norms:
            return f"gives what has no mean, and {past_norms}, which reads the stream directly, would miss it"
        return ""

    def move(self, graph: Graph, change: Mapping[str, Any], tensors: Edits, config: dict[str, Any]) -> list[str]:
        """Add the edits to ``tensors``.

        Args:
            graph: the model.
            change: of the basis: an edit without its axis.
            tensors: tensor -> its edits.
            config: of the model; says so where the head gets a tensor of its own.

        Returns:
            Sentences for the user.
        """
        settings = self.calls[0].module or {}
        path, offset = self.calls[0].path, settings["offset"]
        weight = f"{path}.{settings['weight']}"
        gain: Expression = plus(weight, offset)
        row = {"op": "normed", "by": gain, "eps": settings["eps"], "centred": self.calls[0].centred, "axis": 1}
        tensors[self.name] = [row, {**change, "axis": 1}]
        tensors[weight] = [{"op": "bound", "by": minus(["power_above", gain], offset)}]
        if settings["bias"] is not None:
            tensors[f"{path}.{settings['bias']}"] = [{**change, "axis": 0}]
        if not self.head:
            return []
        return [untie_head(graph, self.name, self.head, tensors, config)]


def normed_tables(
    analysis: Analysis, calls: Mapping[str, list[Norm]], where: Mapping[Norm, tuple[Stream, AxisRef]]
) -> dict[str, NormedTable]:
    """Norm -> the table, where rows of one table, or what a call gives in place of them, are all that it reads."""
    found = {path: _normed_table(analysis, group, where) for path, group in calls.items()}
    return {path: table for path, table in found.items() if table is not None}


def _normed_table(
    analysis: Analysis, group: list[Norm], where: Mapping[Norm, tuple[Stream, AxisRef]]
) -> NormedTable | None:
    settings = group[0].module
    # Without an eps, rows of any size give what has the size of ones.
    if settings is None or not settings["eps"] or settings["weight"] is None:
        return None
    plain = all(norm in where and norm.output is norm.result for norm in group)
    if not plain or misuse(group[0].path, group, analysis.graph) is not None:
        return None
    streams = [where[norm][0] for norm in group]
    if any(stream.leaks or any(norm not in group for norm, _ in stream.norms) for stream in streams):
        return None
    members = {ref: made for stream in streams for ref, made in stream.members.items()}
    tables = {ref for ref, made in members.items() if made.kind == "parameter"}
    outside = tuple(ref for ref in members if ref[0] in analysis.graph.outside)
    between = members.keys() - tables - set(outside)
    same = all(name_of(node) in _SAME and members[node, place].kind == "sum" for node, place in between)
    if not same or len(tables) != 1:
        return None
    ((table, place),) = tables
    if place.dim != 1 or not spans((table, place)):
        return None
    parameter = analysis.graph.parameters[table]
    others = list(analysis.other_readers((table, place), members.__contains__))
    if others:
        if len(parameter.aliases) != 2 or not can_untie(analysis, (table, place), others):
            return None
        return NormedTable(group, *table_and_head(analysis.graph, table), outside)
    return NormedTable(group, parameter.name, "", outside) if len(parameter.aliases) == 1 else None
