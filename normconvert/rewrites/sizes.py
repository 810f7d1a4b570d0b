"""Sizes that modules keep beside their tensors, and what to try when a model does not run at the new ones.

Which attribute of a module holds a size is not looked up by its class: an attribute that equals the old width is set to
the new one where the model stops without it, and the comparison (`comparison`) decides whether that was right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.analysis.streams import Spot, Stream
from normconvert.rewrites.comparison import narrowed
from normconvert.rewrites.edited_trace import Differs
from normconvert.rewrites.regions import Stays
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARK

SIZES = (
    ("out_features", "in_features"),
    ("num_embeddings", "embedding_dim"),
    ("out_channels", "in_channels"),
    ("nx", "nf"),
)
"""Attributes that name dimensions 0 and 1 of a module's weight."""

Attributes = Mapping[str, Mapping[str, int]]
"""Module path -> attribute -> new value."""


def resize_edits(graph: Graph, compressed: Collection[Spot], attributes: Attributes) -> list[dict[str, Any]]:
    """Rows that give the stored tensors among ``compressed`` their new shapes, and modules their new attributes."""
    places: dict[fx.Node, list[ChannelAxis]] = defaultdict(list)
    for node, place in compressed:
        if node in graph.parameters:
            places[node].append(place)
    edits: list[dict[str, Any]] = []
    rest = {path: dict(values) for path, values in attributes.items()}
    for node, parameter in graph.parameters.items():
        if node not in places:
            continue
        old = tuple(shape_of(node))
        new = narrowed(old, places[node])
        for name in parameter.aliases:
            path, _, leaf = name.rpartition(".")
            edit: dict[str, Any] = {"op": "resize", "path": path, "name": leaf, "shape": list(new)}
            found = _named_sizes(graph.modules[path], leaf, old, new) | rest.pop(path, {})
            edits.append({**edit, "set": found} if found else edit)
    edits += [{"op": "set", "path": path, "set": values} for path, values in rest.items() if values]
    return edits


def _named_sizes(module: nn.Module, leaf: str, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, int]:
    if leaf != "weight" or len(old) < 2:
        return {}
    for names in SIZES:
        if all(getattr(module, name, None) == size for name, size in zip(names, old, strict=False)):
            return {name: b for name, a, b in zip(names, old, new, strict=False) if a != b}
    return {}


@dataclass
class _Attempts:
    """What is left to try for one kind of module: (attributes to change, whether norms give it all channels)."""

    left: list[tuple[list[str], bool]]
    norms: list[str]
    reason: str


@dataclass
class Remedies:
    """What to try for modules that the edited model stops at, by kind, since all blocks are alike.

    First all channels for what such a module reads of norms; then the new width for its attributes that equal the old
    one, all of them and one by one; then both. When nothing helps, a stream stays as it was.

    Attributes:
        graph: the traced model.
        expanded: norms that have to give all channels, and why.
        attributes: sizes that modules keep.
    """

    graph: Graph
    expanded: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    attempts: dict[Hashable, _Attempts] = field(default_factory=dict)

    def next(self, difference: Differs, values: Mapping[str, Collection[fx.Node]], sizes: Collection[int]) -> bool:
        """Prepare the next attempt.

        Args:
            difference: where the model stopped, and why.
            values: folded norm -> what is made of it, and what reads that.
            sizes: the old widths of the compressed streams.

        Returns:
            False if there is nothing left to try.
        """
        kind, paths = self._alike(difference.path)
        if kind not in self.attempts:
            norms = [norm for norm, nodes in values.items() if any(_runs_in(node, paths) for node in nodes)]
            # type, not isinstance: True is no width.
            own = [n for n, v in vars(self.graph.modules[difference.path]).items() if type(v) is int and v in sizes]
            choices = ([own] if own else []) + ([[name] for name in own] if len(own) > 1 else [])
            left: list[tuple[list[str], bool]] = [([], True)] if norms else []
            left += [(choice, False) for choice in choices]
            left += [(choice, True) for choice in choices] if norms else []
            self.attempts[kind] = _Attempts(left, norms, str(difference))
        attempts = self.attempts[kind]
        if not attempts.left:
            return False
        names, expand = attempts.left.pop(0)
        # Each attempt stands alone: what the last one changed is taken back.
        for norm in attempts.norms:
            self.expanded.pop(norm, None)
        self.expanded |= dict.fromkeys(attempts.norms if expand else [], attempts.reason)
        for path in paths:
            found = {name: getattr(self.graph.modules[path], name, None) for name in names}
            self.attributes[path] = {n: v - 1 for n, v in found.items() if type(v) is int and v in sizes}
        return True

    def surrender(
        self, difference: Differs, streams: Collection[Stream], compressed: Collection[Spot]
    ) -> dict[Spot, Stays]:
        """The values that have to stay as they are, since a module cannot run without all their channels.

        Of the streams that such a module touches they are the one with the fewest norms.
        """
        _, paths = self._alike(difference.path)
        where = f"`{difference.path}`" if difference.path else "the model"
        why = Stays("", f"{where} does not run in one channel less, or computes something else: {difference}", "width")
        inside = tuple(f"{path}." if path else "" for path in paths)
        found: list[tuple[Stream, list[Spot]]] = []
        # What the module itself touches comes first; only a container touches nothing but what is inside.
        for touches in (lambda node: _runs_in(node, paths), lambda node: module_path(node).startswith(inside)):
            found = [(s, [p for p in s.members if p in compressed and touches(p[0])]) for s in streams]
            found = [(stream, spots) for stream, spots in found if spots]
            if found:
                break
        least = min((len(stream.norms) for stream, _ in found), default=0)
        spots = [spot for stream, spots in found if len(stream.norms) == least for spot in spots]
        # Nothing is found to blame: all is given up rather than tried again without end.
        return dict.fromkeys(spots or compressed, why)

    def _alike(self, path: str) -> tuple[Hashable, set[str]]:
        """The kind of a module, and the paths of all of that kind."""
        kind = self._kind(path)
        return kind, {other for other in self.graph.modules if self._kind(other) == kind}

    def _kind(self, path: str) -> Hashable:
        """What a module is: its class, its name without numbers, and the class it is a part of."""
        parent, _, name = path.rpartition(".")
        return type(self.graph.modules[path]), re.sub(r"\d+", "#", name), type(self.graph.modules.get(parent))


def _runs_in(node: fx.Node, paths: Collection[str]) -> bool:
    """Whether a module at one of the paths runs the node, or takes or gives the value that is marked here."""
    path = str(node.args[1]) if node.target is MARK else module_path(node)
    return path in paths or (node.target is not MARK and path.rpartition(".")[0] in paths)
