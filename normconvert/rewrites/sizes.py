"""Sizes that modules keep beside their tensors, and what to try when a model does not run at the new ones.

Which attribute of a module holds a size is not looked up by its class: an attribute that equals the old width is set to
the new one where the model stops without it, and the comparison (`comparison`) decides whether that was right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.analysis.streams import AxisRef, Stream
from normconvert.rewrites.edited_trace import Differs
from normconvert.rewrites.graph_values import narrowed
from normconvert.rewrites.regions import Stays
from normconvert.tracing.graph import Graph, home_of, module_path
from normconvert.tracing.in_place_writes import MARKER

SIZES = (
    ("out_features", "in_features"),
    ("num_embeddings", "embedding_dim"),
    ("out_channels", "in_channels"),
    ("nx", "nf"),
)
"""Attributes that name dimensions 0 and 1 of a module's weight."""

Attributes = Mapping[str, Mapping[str, int]]
"""Module path -> attribute -> new value."""


def resize_edits(
    graph: Graph, compressed: Collection[AxisRef], attributes: Attributes, whole: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Rows that give the stored tensors among ``compressed`` their new shapes, and modules their new attributes.

    Tensors in ``whole`` are tied to one of these, and are untied and stay as wide as they were.
    """
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
        for name in (name for name in parameter.aliases if name not in whole):
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


@dataclass(frozen=True)
class _Attempt:
    """What is tried for one kind of module: attributes to set, and norms that give all channels, with the reason."""

    attributes: Attributes
    expanded: Mapping[str, str]


@dataclass
class Remedies:
    """What to try for modules that the edited model stops at, by kind, since all blocks are alike.

    First all channels for what such a module reads of norms; then the new width for its attributes that equal the old
    one, all of them and one by one; then both. When nothing helps, a stream stays as it was.

    Attributes:
        graph: the traced model.
        tried: the attempt that is under way for each kind of module.
        untried: what is left to try for it.
    """

    graph: Graph
    tried: dict[Hashable, _Attempt] = field(default_factory=dict)
    untried: dict[Hashable, Iterator[_Attempt]] = field(default_factory=dict)

    @property
    def expanded(self) -> dict[str, str]:
        """Norms that have to give all channels, and why."""
        return {norm: why for attempt in self.tried.values() for norm, why in attempt.expanded.items()}

    @property
    def attributes(self) -> Attributes:
        """Sizes that modules keep."""
        return {path: sizes for attempt in self.tried.values() for path, sizes in attempt.attributes.items()}

    def next(self, difference: Differs, values: Mapping[str, Collection[fx.Node]], sizes: Collection[int]) -> bool:
        """Prepare the next attempt; each stands alone, in place of the one before.

        Args:
            difference: where the model stopped, and why.
            values: folded norm -> what is made of it, and what reads that.
            sizes: the old widths of the compressed streams.

        Returns:
            False if there is nothing left to try.
        """
        kind, paths = self._alike(difference.path)
        attempt = next(self.untried.setdefault(kind, self._attempts(difference, paths, values, sizes)), None)
        if attempt is None:
            return False
        self.tried[kind] = attempt
        return True

    def _attempts(
        self, difference: Differs, paths: Set[str], values: Mapping[str, Collection[fx.Node]], sizes: Collection[int]
    ) -> Iterator[_Attempt]:
        """All that can be tried for the modules at ``paths``, in order."""
        norms = [norm for norm, nodes in values.items() if any(_runs_in(node, paths) for node in nodes)]
        expanded = dict.fromkeys(norms, str(difference))
        widths = {path: _widths(self.graph.modules[path], sizes) for path in paths}
        own = list(widths[difference.path])
        choices = ([own] if own else []) + ([[name] for name in own] if len(own) > 1 else [])
        changes = [
            {path: {n: v - 1 for n, v in found.items() if n in names} for path, found in widths.items()}
            for names in choices
        ]
        if norms:
            yield _Attempt({}, expanded)
        yield from (_Attempt(change, {}) for change in changes)
        if norms:
            yield from (_Attempt(change, expanded) for change in changes)

    def surrender(
        self, difference: Differs, streams: Collection[Stream], compressed: Collection[AxisRef]
    ) -> dict[AxisRef, Stays]:
        """The values that have to stay as they are, since a module cannot run without all their channels.

        Of the streams that such a module touches they are the one that is most its own: with the fewest norms outside
        of it, and the fewest of all.
        """
        _, paths = self._alike(difference.path)
        inside = tuple(f"{path}." if path else "" for path in paths)
        found: list[tuple[Stream, list[AxisRef]]] = []
        # What the module itself touches comes first; only a container touches nothing but what is inside.
        for touches in (lambda node: _runs_in(node, paths), lambda node: module_path(node).startswith(inside)):
            found = [(s, [p for p in s.members if p in compressed and touches(p[0])]) for s in streams]
            found = [(stream, refs) for stream, refs in found if refs]
            if found:
                break
        ranks = [_norms_elsewhere(stream, inside) for stream, _ in found]
        blamed = [one for one, rank in zip(found, ranks, strict=True) if rank == min(ranks)]
        # Nothing is found to blame: all is given up rather than tried again without end.
        refs = [ref for _, refs in blamed for ref in refs] or compressed
        return dict.fromkeys(refs, self._refusal(difference, {stream.size for stream, _ in blamed}))

    def _refusal(self, difference: Differs, sizes: Collection[int]) -> Stays:
        """Why a module's stream stays: what it said, and which of its sizes were tried."""
        where = f"`{difference.path}`" if difference.path else "the model"
        own = _widths(self.graph.modules[difference.path], sizes)
        tried = ", whether its " + " and ".join(f"{n} is {v} or {v - 1}" for n, v in sorted(own.items())) if own else ""
        what = f"{where} does not run in one channel less, or computes something else{tried}: {difference}"
        return Stays("", what, "width")

    def _alike(self, path: str) -> tuple[Hashable, set[str]]:
        """The kind of a module, and the paths of all of that kind."""
        kind = self._kind(path)
        return kind, {other for other in self.graph.modules if self._kind(other) == kind}

    def _kind(self, path: str) -> Hashable:
        """What a module is: its class, its name without numbers, and the class it is a part of."""
        parent, _, name = path.rpartition(".")
        return type(self.graph.modules[path]), re.sub(r"\d+", "#", name), type(self.graph.modules.get(parent))


def _norms_elsewhere(stream: Stream, inside: Collection[str]) -> tuple[int, int]:
    """How many norms a stream has outside of the one module, of some, that holds most of them; and in all."""
    total = len(stream.norms)
    return min(total - sum(norm.path.startswith(one) for norm, _ in stream.norms) for one in inside), total


def _runs_in(node: fx.Node, paths: Collection[str]) -> bool:
    """Whether a module at one of the paths runs the node, or takes or gives the value that is marked here."""
    path = home_of(node)
    return path in paths or (node.target is not MARKER and path.rpartition(".")[0] in paths)


def _widths(module: nn.Module, sizes: Collection[int]) -> dict[str, int]:
    """The attributes of a module that are one of the sizes."""
    # type, not isinstance: True is no width.
    return {name: value for name, value in vars(module).items() if type(value) is int and value in sizes}
