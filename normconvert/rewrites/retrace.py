"""The proof that a model whose tensors have other sizes computes what it did, in another basis.

The edited skeleton is traced with the same inputs. Its graph must be the old one, operation by operation, with the
same numbers in it, with compressed values exactly where the plan has them, and with all other shapes as they were.
Since each operation of a stream treats every channel alike, a compressed value is then B times the old one. So nothing
is assumed about how a class uses its sizes: one that splits a compressed value into heads, or divides by the root of
its width, shows itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normconvert.analysis.channel_axes import Place, shape_of
from normconvert.analysis.op_table import POINTWISE, varies
from normconvert.analysis.operations import NEUTRAL, name_of
from normconvert.analysis.streams import AxisRef, operation
from normconvert.errors import TraceError
from normconvert.runtime import Compress, add_hook, apply_module_edits
from normconvert.tracing.graph import Graph, merge, module_path, trace
from normconvert.tracing.in_place_writes import MARKER, Boundary
from normconvert.tracing.model_copy import copy_model


class Differs(Exception):
    """The edited model is not the old one; ``path`` is the module where that shows."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True)
class Meant:
    """What is meant to differ.

    Attributes:
        compressed: values, and stored tensors, in one channel less.
        live: values that matter to what the model returns.
        norms: paths of the norms that are replaced.
        inserted: where values are compressed.
        biases: reader -> name of the bias it is given.
        untied: names that are tensors of their own now, and their shapes.
    """

    compressed: Collection[AxisRef]
    live: Collection[fx.Node]
    norms: Collection[str]
    inserted: Collection[Boundary]
    biases: Mapping[fx.Node, str] = field(default_factory=dict)
    untied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@torch.library.custom_op("normconvert::compress", mutates_args=())
def _compress(x: Tensor, axis: int) -> Tensor:
    """Stands for the operation of the runtime in the proof: one channel less."""
    return x.narrow(axis, 0, x.shape[axis] - 1).clone()  # no view of its input


@_compress.register_fake
def _(x: Tensor, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] -= 1
    return x.new_empty(shape)


_COMPRESS = torch.ops.normconvert.compress.default


class _Stub(Compress):
    def change(self, x: Tensor) -> Tensor:
        result: Tensor = _compress(x, self.axis)
        return result


def prove(graph: Graph, modules: Sequence[Mapping[str, Any]], meant: Meant) -> None:
    """Trace the model with ``modules`` applied and compare.

    Raises:
        Differs: it cannot be traced, or computes something else.
    """
    model = copy_model(graph.modules[""])
    try:
        # The runtime's arithmetic would be operations that the old graph has not; one stands for it, see _Stub.
        apply_module_edits(model, [edit for edit in modules if edit["op"] != "compress"])
    except ValueError as error:
        raise Differs("", str(error)) from error
    for name, shape in meant.untied.items():
        _untie(model, name, shape)
    for edit in modules:
        if edit["op"] == "compress":
            place = edit["side"], edit["key"], edit["axis"]
            add_hook(model, edit, _Stub(*place, edit["basis"], bool(edit.get("optional"))))
    edited: Graph | None = None
    with _running(model) as stack:
        for inputs, path in graph.calls:
            try:
                found = trace(model, inputs, model.get_submodule(path) if path else None)
            except TraceError as error:
                reason = str(error).removeprefix("the model could not be traced: ")
                raise Differs(stack[-1] if stack else "", reason) from error
            edited = found if edited is None else merge(edited, found)
    assert edited is not None
    _Comparison(graph, edited, meant).run()


def _untie(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner.register_parameter(leaf, nn.Parameter(owner.get_parameter(leaf).new_empty(shape)))


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """While open, the paths of the modules that run, innermost last; they stay where an error stops the model."""
    stack: list[str] = []
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            stack.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()

        # First, so that an error in another hook is this module's.
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))

    for path, module in model.named_modules():
        watch(path, module)
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


_SIZES: dict[str, int] = {
    **dict.fromkeys(["aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.split"], 1),
    **dict.fromkeys(["aten.split_with_sizes", "aten.broadcast_to", "aten.new_zeros", "aten.new_ones"], 1),
    **dict.fromkeys(["aten.new_full", "aten.new_empty"], 1),
    **dict.fromkeys(["aten.zeros", "aten.ones", "aten.full", "aten.empty"], 0),
    **dict.fromkeys(["aten.unflatten"], 2),
    "aten.slice": 3,
}
"""Operation -> the argument that holds sizes: it may differ as far as the shapes of the results may."""

_ELEMENTWISE = POINTWISE | {"aten.masked_fill", "aten.masked_scatter"}
_IGNORED = {"aten._assert_tensor_metadata"}


class _Comparison:
    """Two graphs, walked side by side."""

    def __init__(self, old: Graph, new: Graph, meant: Meant) -> None:
        self.old, self.new, self.meant = old, new, meant
        self.places: dict[fx.Node, set[Place]] = defaultdict(set)
        for node, place in meant.compressed:
            self.places[node].add(place)
        self.image: dict[fx.Node, fx.Node] = {}
        self.constant: dict[fx.Node, int] = {}  # a value that is the same in all channels, and how many it has now

    def run(self) -> None:
        """Raise Differs at the first difference that is not meant."""
        self._placeholders()
        pairs = self._operations(self.old), self._operations(self.new)
        # Before their numbers are compared: the first operation that differs says more than a surplus.
        for a, b in zip(*pairs, strict=False):
            self._pair(a, b)
        if len(pairs[0]) != len(pairs[1]):
            longer, what = max(pairs, key=len), "runs in addition" if len(pairs[1]) > len(pairs[0]) else "runs no more"
            node = longer[min(len(pairs[0]), len(pairs[1]))]
            raise Differs(module_path(node), f"{operation(node)} {what} at the new width")
        # A graph has no values, so a constant made of the width would look like one that is not.
        if self.old.constants != self.new.constants:
            raise Differs("", "the model makes constants of its width")
        for node, names in self.old.outputs.items():
            if self.places.get(node) or self.new.outputs.get(self.image.get(node, node)) != names:
                raise Differs(module_path(node), f"the output {', '.join(names)} is another value")

    def _placeholders(self) -> None:
        stored = {p.name: node for node, p in self.new.parameters.items() if node.users}
        given = iter([n for n in self.new.nodes if n.op == "placeholder" and n not in self.new.parameters])
        for node in self.old.nodes:
            parameter = self.old.parameters.get(node)
            if node.op != "placeholder" or (parameter is not None and not node.users):
                continue
            other = next(given, None) if parameter is None else stored.get(parameter.name)
            if other is None:
                if parameter is not None:  # nobody reads it any more: the weight of a norm
                    continue
                raise Differs("", f"the input `{node.name}` is gone")
            self.image[node] = other
            self._shapes(node, other)

    def _operations(self, graph: Graph) -> list[fx.Node]:
        inside = tuple(self.meant.norms)
        prefixes = tuple(f"{path}." for path in inside)
        return [
            node
            for node in graph.nodes
            if node.op not in ("placeholder", "output")
            and name_of(node) not in _IGNORED
            and node.target is not _COMPRESS
            # What a replaced norm does inside is meant to differ; its boundary is not.
            and (node.target is MARKER or not self._within(module_path(node), inside, prefixes))
        ]

    @staticmethod
    def _within(path: str, paths: tuple[str, ...], prefixes: tuple[str, ...]) -> bool:
        return path in paths or path.startswith(prefixes)

    def _pair(self, a: fx.Node, b: fx.Node) -> None:
        if a.target != b.target or a.op != b.op:
            raise Differs(module_path(a), f"{operation(a)} becomes {operation(b)} at the new width")
        self.image[a] = b
        # What nothing returned depends on may have any shape.
        if a not in self.meant.live:
            return
        if a.target is MARKER:
            self._mark(a, b)
        else:
            self._arguments(a, b)
        self._shapes(a, b)

    def _mark(self, a: Any, b: Any) -> None:
        if a.args[1:] != b.args[1:]:
            raise Differs(module_path(a), f"`{a.args[1]}` runs in another order at the new width")
        path, side, key = a.args[1:4]
        if side == "output" and path in self.meant.norms:
            return  # the new norm's result stands for the old one's
        source = b.args[0]
        if (path, side, key) in self.meant.inserted:
            if source.target is not _COMPRESS:
                raise Differs(path, f"nothing compresses the {side} of `{path}`")
            # The hook that compresses was there before the marker's, so the marker marks what it has made.
            source = source.args[0]
        if self.image.get(a.args[0]) is not source:
            raise Differs(path, f"the {side} of `{path}` is another value at the new width")

    def _arguments(self, a: fx.Node, b: fx.Node) -> None:
        old, new = list(a.args), list(b.args)
        if a in self.meant.biases:
            name = self.new.parameters.get(new[2]) if len(new) > 2 and isinstance(new[2], fx.Node) else None
            if name is None or self.meant.biases[a] not in name.aliases:
                raise Differs(module_path(a), f"{operation(a)} does not use the bias that it is given")
            old = [*old[:2], None, *old[3:]]
            new[2] = None
        sizes = _SIZES.get(name_of(a))
        for i, (x, y) in enumerate(zip(old, new, strict=False)):
            if not self._same(x, y, free=i == sizes):
                raise Differs(module_path(a), f"{operation(a)} has the argument {y}, not {x}, at the new width")
        if len(old) != len(new) or not self._same(dict(a.kwargs), dict(b.kwargs)):
            raise Differs(module_path(a), f"{operation(a)} is called in another way at the new width")

    def _same(self, a: Any, b: Any, free: bool = False) -> bool:
        if isinstance(a, fx.Node):
            return isinstance(b, fx.Node) and self._same_node(a, b)
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(self._same, a, b, [free] * len(a)))
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(self._same(a[k], b[k]) for k in a)
        if free and isinstance(a, int) and isinstance(b, int):
            return True
        # 1 equals True in Python, and is another argument; NaN equals nothing, and is the same as NaN here.
        return type(a) is type(b) and (a == b or (a != a and b != b))

    def _same_node(self, a: fx.Node, b: fx.Node) -> bool:
        if self.image.get(a) is b:
            return True
        old, new = self.old.parameters.get(a), self.new.parameters.get(b)  # one side of a table that is untied
        return bool(old and new and new.name in old.aliases and not self.meant.untied.keys().isdisjoint(old.aliases))

    def _shapes(self, a: fx.Node, b: fx.Node) -> None:
        old, new = _tensors(a), _tensors(b)
        if len(old) != len(new):
            raise Differs(module_path(a), f"{operation(a)} has other results at the new width")
        for x, y in zip(old, new, strict=True):
            if x.dtype != y.dtype:
                raise Differs(module_path(a), f"{operation(a)} is {y.dtype}, not {x.dtype}, at the new width")
            expected, shape = narrowed(_sizes(x), self.places.get(a, ())), _sizes(y)
            if expected != shape and not self._constant(a, _sizes(x), shape):
                wrong = f"{operation(a)} has the shape {list(shape)} at the new width, not {list(expected)}"
                raise Differs(module_path(a), wrong)
        if a not in self.constant:
            for source in a.all_input_nodes:
                if source in self.constant and not self._aligned(a, source):
                    raise Differs(module_path(a), f"{operation(a)} reads a mask of the new width")

    def _constant(self, a: fx.Node, old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
        """Whether a value outside the stream has fewer channels, and is the same in all of them."""
        dims = [d for d, (x, y) in enumerate(zip(old, new, strict=False)) if x != y]
        if len(old) != len(new) or len(dims) != 1 or self.places.get(a) or isinstance(a.meta.get("val"), (list, tuple)):
            return False
        (dim,) = dims
        if new[dim] != old[dim] - 1 or varies(a, Place(dim, old[dim])):
            return False
        # Counted from the end, as broadcasting does: `_aligned` looks for it in a value of another rank.
        self.constant[a] = dim - len(old)
        return True

    def _aligned(self, a: fx.Node, source: fx.Node) -> bool:
        """Whether ``a`` is compressed where ``source`` lies along it, or asks for no values."""
        axis = len(shape_of(a)) + self.constant[source]
        compressed = any(place.dim == axis and place.whole for place in self.places.get(a, ()))
        return name_of(a) in NEUTRAL or (name_of(a) in _ELEMENTWISE and compressed)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _sizes(x: Tensor) -> tuple[Any, ...]:
    """The shape, with sizes that depend on data as expressions."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in x.shape)


def narrowed(shape: tuple[Any, ...], places: Collection[Place]) -> tuple[Any, ...]:
    """The shape with one channel less at each place."""
    sizes = list(shape)
    for place in places:
        sizes[place.dim] = place.outer * (place.size - 1) * place.inner
    return tuple(sizes)
