"""Linear maps that read a stream past its norms, which take the inverse of its change of basis: W x = (W Q') Q x.

A projector that reads the outputs of a layer, a router, a head without a norm before it. In another basis than a norm's
readers they need nothing of a norm; they do need a stored weight whose rows nobody else reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import fx

from normconvert.analysis.streams import Analysis, Stream, operation
from normconvert.rewrites.fold import reading
from normconvert.rewrites.readers import Reader, Unfoldable, linear_reader, readers_of_rows
from normconvert.rewrites.writers import Edits


class StreamReaders:
    """The linear maps that read the streams of a graph past their norms."""

    def __init__(self, analysis: Analysis) -> None:
        """Take them out of the streams' leaks, where they are no longer in the way of another basis."""
        self._graph = analysis.graph
        self._by_stream: dict[int, list[Reader]] = defaultdict(list)
        for stream in analysis.streams:
            left = []
            for leak in stream.leaks:
                try:
                    self._by_stream[id(stream)].append(linear_reader(analysis, leak, parts=True))
                except Unfoldable:
                    left.append(leak)
            stream.leaks = left

    def first(self, stream: Stream) -> str:
        """A map that reads a stream, in words; empty if none does."""
        return next((operation(next(iter(reader.nodes))) for reader in self._by_stream[id(stream)]), "")

    def obstacle(self, stream: Stream, streams: Iterable[Stream]) -> str:
        """Why a map keeps a stream as it is, where ``streams`` take the change; empty if none does."""
        alike: dict[tuple[Any, ...], set[fx.Node]] = defaultdict(set)
        for one in streams:
            for reader in self._by_stream[id(one)]:
                alike[_recipe(reader)] |= reader.nodes
        for reader in self._by_stream[id(stream)]:
            name = operation(next(iter(reader.nodes)))
            node = next(node for node, one in self._graph.parameters.items() if one.name == reader.weight)
            if len(self._graph.parameters[node].aliases) > 1:
                return f"{name} reads it directly, and `{reader.weight}` is tied"
            for other in readers_of_rows(node, reader.out, reader.rows):
                if other not in alike[_recipe(reader)]:
                    return f"{name} reads it directly, and {operation(other)} reads `{reader.weight}`, too"
        return ""

    def move(self, streams: Iterable[Stream], tensors: Edits, change: dict[str, Any]) -> None:
        """Add the edits for streams that take a change of basis to ``tensors``; ``change`` is one without its axis."""
        seen = set()
        for reader in (reader for stream in streams for reader in self._by_stream[id(stream)]):
            if _recipe(reader) not in seen:
                seen.add(_recipe(reader))
                tensors.setdefault(reader.weight, []).append({**change, **reading(reader)})


def _recipe(reader: Reader) -> tuple[Any, ...]:
    """All but the nodes: equal for two calls that ask the same of the weight."""
    return reader.weight, reader.place, reader.out, reader.rows
