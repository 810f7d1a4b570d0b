"""Is what one class does only a part of what another does, which is proved? Then there is nothing left to prove of it.

A class without a head is a module of the class with one. Where the module is of that very class, and each call of it
alone is, operation by operation, what the module does within a call of the whole, the edits do the same to both: the
comparison of the whole with its edited self has compared this as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from normconvert.rewrites.graph_values import same_number, same_value
from normconvert.tracing.entries import is_whole
from normconvert.tracing.graph import Graph, home_of, module_path
from normconvert.tracing.in_place_writes import MARKER


def runs_inside(inner: Graph, outer: Graph, path: str) -> bool:
    """Whether each traced call of ``inner`` is what the module at ``path`` does in a call of ``outer``.

    Args:
        inner: of a model by itself.
        outer: of a model that may hold one of its class.
        path: where; the tensors have it before their names.
    """
    module = outer.modules.get(path)
    if not path or type(module) is not type(inner.modules[""]):
        return False
    around = _calls(outer)
    return all(any(_Walk(inner, outer, path).same(a, b) for b in around) for a in _calls(inner))


def with_parts_as_ways_out(graph: Graph) -> Graph:
    """What the model returns only if a part of it is called, its base say, is a way out and none of its outputs.

    Such a call is traced where it reaches parameters that no call of the whole does.
    """
    returned: list[set[fx.Node]] = [set(node.all_input_nodes) for node in graph.nodes if node.op == "output"]
    entries = [entry for _, entry in graph.calls]
    own = {value for values, entry in zip(returned, entries, strict=True) for value in values if is_whole(entry)}
    moved: dict[fx.Node, tuple[str, ...]] = {}
    for values, entry in zip(returned, entries, strict=True):
        # In the order of the outputs, which a set has not.
        for value, names in graph.outputs.items() if not is_whole(entry) else ():
            if value in values - own:
                moved[value] = (*graph.exits.get(value, ()), *(f"{entry}.{name}" for name in names))
    outputs = {value: names for value, names in graph.outputs.items() if value not in moved}
    return replace(graph, outputs=outputs, exits={**graph.exits, **moved})


def _calls(graph: Graph) -> list[list[fx.Node]]:
    """The operations of each call; an output ends one."""
    calls: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "output":
            calls.append([])
        elif node.op != "placeholder":
            calls[-1].append(node)
    return calls[:-1]


class _Walk:
    """Two calls side by side.

    Attributes:
        image: value of the inner graph -> the same value in the outer one, without the markers at ``path``.
    """

    def __init__(self, inner: Graph, outer: Graph, path: str) -> None:
        self.inner, self.outer, self.path = inner, outer, path
        self.image: dict[fx.Node, fx.Node] = {}

    def same(self, inside: Sequence[fx.Node], around: Sequence[fx.Node]) -> bool:
        within = [node for node in around if self._is_within(node)]
        return len(inside) == len(within) and all(map(self._same_operation, inside, within))

    def _is_within(self, node: fx.Node) -> bool:
        # The model by itself has no boundary to mark.
        at = home_of(node)
        return at.startswith(f"{self.path}.") or (at == self.path and node.target is not MARKER)

    def _same_operation(self, a: fx.Node, b: fx.Node) -> bool:
        place = f"{self.path}.{module_path(a)}".rstrip(".")
        self.image[a] = b
        if a.target is MARKER:
            here = (f"{self.path}.{a.args[1]}", *a.args[2:])
            return b.target is MARKER and here == b.args[1:] and self._same(a.args[0], b.args[0])
        alike = a.op == b.op and a.target == b.target and place == module_path(b)
        return alike and self._same(a.args, b.args) and self._same(a.kwargs, b.kwargs)

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            return isinstance(b, fx.Node) and self._same_value(a, self._entering(b))
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(self._same, a, b))
        if isinstance(a, Mapping):
            return isinstance(b, Mapping) and a.keys() == b.keys() and all(self._same(a[k], b[k]) for k in a)
        return same_number(a, b)

    def _entering(self, node: fx.Node) -> fx.Node:
        """What a marker at the module's own boundary marks."""
        while node.target is MARKER and node.args[1] == self.path and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _same_value(self, a: fx.Node, b: fx.Node) -> bool:
        if a.op != "placeholder":
            return self.image.get(a) is b
        here, there = self.inner.parameters.get(a), self.outer.parameters.get(b)
        if here is not None:
            named = here.value is not None or f"{self.path}.{here.name}" in (there.aliases if there else ())
            return there is not None and named and same_value(here.value, there.value)
        # What comes from outside comes from outside of both, as it is, and each by itself.
        free = b.op == "placeholder" and there is None and (b in self.outer.outside) == (a in self.inner.outside)
        first = self.image.setdefault(a, b) is b and list(self.image.values()).count(b) == 1
        return free and first and _size(a) == _size(b)


def _size(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return (tuple(value.shape), value.dtype) if hasattr(value, "shape") else (value,)
