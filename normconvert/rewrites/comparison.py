"""Is the edited model the old one? Two graphs, walked side by side.

The edited skeleton is traced with the inputs of the original. Its graph must be the old one, operation by operation,
with the same numbers in it, but for what is expected to change. So nothing is assumed about what a class does with its
children, its attributes, its sizes or a bias that it lacks. In a stream that is stored in one channel less, each
operation treats every channel alike, so that a compressed value is B times the old one where all shapes are as
expected: a class that splits such a value into heads, or divides by the root of its width, shows itself.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import singledispatchmethod
from itertools import islice
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, shape_of, sizes_of
from normconvert.analysis.op_table import POINTWISE, varies
from normconvert.analysis.streams import operation
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.clipping import TENSORS
from normconvert.rewrites.edited_trace import INSERTED, NORM, Differs, settings_of, trace_edited
from normconvert.rewrites.expected_changes import (
    Biased,
    Clamped,
    Epsilon,
    ExpectedChanges,
    Gone,
    Inserted,
    Merged,
    Renormed,
    Replaced,
    SameAs,
)
from normconvert.rewrites.graph_values import (
    CLAMP,
    SIZES,
    floats_of,
    marks_by_key,
    narrowed,
    same_number,
    same_value,
    tensors_of,
    with_epsilon,
)
from normconvert.rewrites.norm_calls import is_cast, norm_calls
from normconvert.rewrites.ties import switches
from normconvert.rewrites.unordered import Expressions, live
from normconvert.tracing.graph import Graph, Parameter, module_path
from normconvert.tracing.in_place_writes import MARKER, unmarked
from normconvert.tracing.operations import NEUTRAL, SILENT, name_of


def prove(graph: Graph, plan: Plan, changes: ExpectedChanges) -> None:
    """Trace the model with the module edits of ``plan`` applied, and compare.

    Raises:
        Differs: it cannot be traced, or computes something else.
    """
    compare(graph, trace_edited(graph, plan.modules, changes.untied, switches(plan)), changes)


def compare(old: Graph, new: Graph, changes: ExpectedChanges) -> None:
    """Compare the graph of an edited model with the original's.

    Raises:
        Differs: at the first difference that is not expected.
    """
    _Comparison(old, new, changes).run()


_ELEMENTWISE = POINTWISE | {"aten.masked_fill", "aten.masked_scatter"}


class _Comparison:
    """Two graphs, walked side by side.

    Attributes:
        image: value of the old graph -> the same value in the new one, without marks.
        rest: the new graph's operations that have not been reached yet.
        constant: a value that is the same in all channels, and how many it has now.
    """

    def __init__(self, old: Graph, new: Graph, changes: ExpectedChanges) -> None:
        self.old, self.new, self.changes = old, new, changes
        self.places: dict[fx.Node, set[ChannelAxis]] = defaultdict(set)
        for node, place in changes.compressed:
            self.places[node].add(place)
        self.image: dict[fx.Node, Any] = {}
        self.constant: dict[fx.Node, int] = {}
        self.tensors = new.tensors
        renormed = {label.path for label in changes.labels.values() if isinstance(label, Renormed)}
        self.norms = norm_calls(new, renormed)
        self.rest = self._operations()
        self.expressions = Expressions(self.rest if changes.rewritten else (), self._stripped)
        self.live = live(old.outputs) if changes.rewritten else set()
        self.marks: dict[Any, Iterator[fx.Node]] = marks_by_key(new)
        self.width = " at the new width" if changes.compressed else ""

    def run(self) -> None:
        """Raise Differs at the first difference that is not expected."""
        self._placeholders()
        for node in self.old.nodes:
            if node.op in ("placeholder", "output") or name_of(node) in SILENT:
                continue
            label = self.changes.labels.get(node)
            if label is not None:
                self._changed(label, node)
            elif self.changes.rewritten and is_cast(node):
                self._is(node, self._image_of(node.args[0]))
            elif node.target is MARKER:
                source: Any = node.args[0]
                self._is(node, self._image_of(source))
                # The same value, also where nothing reads it there that a stream would follow.
                self.places.setdefault(node, self.places.get(source, set()))
                if node in self.image and self._matters(source):
                    self._shapes(node, self.image[node])
            elif self.changes.rewritten:
                self._same_anywhere(node)
            else:
                self._same_operation(node, self._next(node))
        more = next(self.rest, None)
        if more is not None:
            raise Differs(module_path(more), f"{operation(more)} runs in addition{self.width}")
        self._outputs()

    def _placeholders(self) -> None:
        given = iter([n for n in self.new.nodes if n.op == "placeholder" and n not in self.new.parameters])
        for node in self.old.nodes:
            if node.op != "placeholder":
                continue
            parameter = self.old.parameters.get(node)
            other = next(given, None) if parameter is None else self._tensor(parameter)
            if parameter is None and other is None:
                raise Differs("", f"the input `{node.name}` is gone")
            # Nobody reads the others any more: the weight of a norm.
            if other is None or (parameter is not None and not (node.users and other.users)):
                continue
            self.image[node] = other
            self._shapes(node, other)
            if parameter is not None and not same_value(parameter.value, self.new.parameters[other].value):
                raise Differs("", f"a constant that the model makes has other values{self.width}")

    def _tensor(self, parameter: Parameter) -> fx.Node | None:
        return next((self.tensors[name] for name in parameter.aliases if name in self.tensors), None)

    def _operations(self) -> Iterator[fx.Node]:
        gone = (Replaced, Renormed)
        replaced = [label.path for label in self.changes.labels.values() if isinstance(label, gone)]
        paths, inside = set(replaced), tuple(f"{path}." for path in set(replaced))
        for node in self.new.nodes:
            if node.op in ("placeholder", "output") or node.target in (MARKER, INSERTED) or name_of(node) in SILENT:
                continue
            if self.changes.rewritten and is_cast(node):
                continue
            # What a norm of the runtime does inside is its own; what it made it of is seen.
            path = module_path(node)
            if node.target is NORM or not (path in paths or path.startswith(inside)):
                yield node

    def _next(self, node: fx.Node) -> fx.Node:
        other = next(self.rest, None)
        if other is None:
            raise Differs(module_path(node), f"{operation(node)} runs no more{self.width}")
        return other

    def _image_of(self, node: Any) -> Any:
        return self.image.get(node) if isinstance(node, fx.Node) else node

    def _bare(self, node: Any) -> Any:
        """A value of the new graph: what marks it left out, and where the graph was written anew casts and copies."""
        return self.expressions.value(self._stripped(node))

    def _stripped(self, node: Any) -> Any:
        node = unmarked(node)
        while self.changes.rewritten and isinstance(node, fx.Node) and is_cast(node):
            node = unmarked(node.args[0])
        return node

    def _is(self, node: fx.Node, value: Any) -> None:
        """Note what a value of the old graph is in the new one; nothing, if what it is made of is gone."""
        if value is not None:
            self.image[node] = value

    # What becomes of a node with a label.

    @singledispatchmethod
    def _changed(self, label: object, node: fx.Node) -> None:
        raise NotImplementedError(type(label))

    @_changed.register
    def _(self, label: Gone, node: fx.Node) -> None:
        if node.target is MARKER:  # of what stands there instead, if anything does
            self._is(node, self._image_of(node.args[0]))

    @_changed.register
    def _(self, label: SameAs, node: fx.Node) -> None:
        self._is(node, self._image_of(label.source))

    @_changed.register
    def _(self, label: Inserted, node: Any) -> None:
        path, side, key = node.args[1:4]
        place = f"the {side} of `{path}`"
        mark: Any = next(self.marks.get((path, side, key), iter(())), None)
        found = mark.args[0] if mark is not None else None
        if found is None or found.target is not INSERTED or found.args[1:] != (label.what, label.axis):
            verb = "centres" if label.what == "center" else "compresses"
            raise Differs(path, f"nothing {verb} {place} along axis {label.axis}")
        if unmarked(found.args[0]) is not self._image_of(node.args[0]):
            raise Differs(path, f"{place} is another value{self.width}")
        self.image[node] = found
        self._shapes(node, found)

    @_changed.register
    def _(self, label: Replaced, node: fx.Node) -> None:
        other: Any = self._next(node)
        if other.target is not NORM or module_path(other) != label.path:
            raise Differs(label.path, f"`{label.path}` becomes {operation(other)}{self.width}")
        if unmarked(other.args[1]) is not self._image_of(label.source):
            raise Differs(label.path, f"`{label.path}` reads another value{self.width}")
        if [self.tensors.get(name) if name else None for name in label.tensors] != list(other.args[2:4]):
            raise Differs(label.path, f"`{label.path}` uses other tensors than it should")
        found = settings_of(other)
        for key in {**label.settings, **found}:
            if not same_number(label.settings.get(key), found.get(key)):
                why = f"`{label.path}` has the {key} {found.get(key)}, not {label.settings.get(key)}"
                raise Differs(label.path, why)
        self.image[node] = other  # its shape is compared where a mark shows it

    @_changed.register
    def _(self, label: Renormed, node: fx.Node) -> None:
        call = next(self.norms.get(label.path, iter(())), None)
        if call is None or call.norm.centred:
            raise Differs(label.path, f"`{label.path}` is no RMSNorm there")
        if self._bare(call.source) is not self._image_of(label.source):
            raise Differs(label.path, f"`{label.path}` reads another value")
        found = call.norm.module or {}
        for key in ("size", "eps", "axis"):
            if not same_number(label.settings.get(key), found.get(key)):
                raise Differs(
                    label.path, f"`{label.path}` has the {key} {found.get(key)}, not {label.settings.get(key)}"
                )
        self.image[node] = self._bare(call.result)

    @_changed.register
    def _(self, label: Biased, node: fx.Node) -> None:
        other = self._next(node)
        name = self.new.parameters.get(other.args[2]) if len(other.args) > 2 else None  # type: ignore[arg-type]
        if name is None or label.name not in name.aliases or (len(node.args) > 2 and node.args[2] is not None):
            raise Differs(module_path(node), f"{operation(node)} does not use the bias that it is given")
        self._same_operation(node, other, biased=True)

    @_changed.register
    def _(self, label: Epsilon, node: fx.Node) -> None:
        other = self._next(node)
        if floats_of(other).count(label.new) != 1 or floats_of(node).count(label.old) != 1:
            raise Differs(module_path(node), f"{operation(node)} has not the ε {label.new:g}")
        self._same_operation(node, other, eps=label)

    @_changed.register
    def _(self, label: Clamped, node: fx.Node) -> None:
        found = [self._next(node), *islice(self.rest, 2)]
        read = [self._image_of(label.source), *found]
        right = len(found) == 3 and all(
            name_of(one) == name and not one.kwargs and len(one.args) == 2
            and unmarked(one.args[0]) is value and one.args[1] is self.tensors.get(f"{label.path}.{tensor}")
            for one, name, value, tensor in zip(found, CLAMP, read, TENSORS, strict=False)
        )  # fmt: skip
        if not right:
            raise Differs(label.path, f"`{label.path}` is not the clamp that it should be")
        self.image[label.activation] = found[-1]
        self._shapes(label.activation, found[-1])

    @_changed.register
    def _(self, label: Merged, node: fx.Node) -> None:
        other = self._next(node)
        args: list[Any] = [*other.args, *[None] * 7][:7]
        settings, count = label.settings, len(label.settings["kernel"])
        default = [[1], [0], [1]]
        found = [list(a) if a is not None else d * count for a, d in zip(args[3:6], default, strict=True)]
        right = (
            name_of(other) == f"aten.conv{count}d"
            and unmarked(args[0]) is self._image_of(label.source)
            and [self.tensors.get(f"{label.path}.merged.{leaf}") for leaf in ("weight", "bias")] == args[1:3]
            and found == [settings[key] for key in ("stride", "padding", "dilation")]
            and (args[6] or 1) == settings["groups"]
            and list(shape_of(args[1])[2:]) == settings["kernel"]
        )
        if not right:
            raise Differs(label.path, f"`{label.path}` is not the convolution that it should be")
        self.image[node] = other
        self._shapes(node, other)

    # What becomes of all others: nothing.

    def _same_operation(self, a: fx.Node, b: fx.Node, biased: bool = False, eps: Epsilon | None = None) -> None:
        if a.target != b.target or a.op != b.op:
            raise Differs(module_path(a), f"{operation(a)} becomes {operation(b)}{self.width}")
        self.image[a] = b
        if self._matters(a):
            self._arguments(a, b, biased, eps)
            self._shapes(a, b)

    def _matters(self, node: fx.Node) -> bool:
        """What nothing returned depends on may have any shape."""
        return self.changes.live is None or node in self.changes.live

    def _same_anywhere(self, a: fx.Node) -> None:
        """What the same operation of the same values is, wherever it stands; what nobody needs may be gone."""
        found = self.expressions.find(a, functools.partial(self._read, a))
        if found is not None:
            self.image[a] = found
            self._shapes(a, found)
        elif a in self.live:
            raise Differs(module_path(a), f"nothing there is {operation(a)}")

    def _read(self, at: fx.Node, value: fx.Node) -> Any:
        """What an operation has to read in the new graph, where ``at`` reads a value of the old one."""
        parameter = self.old.parameters.get(value)
        if parameter is not None and not self.changes.untied.keys().isdisjoint(parameter.aliases):
            return self.tensors.get(f"{module_path(at)}.weight")
        return self._image_of(value)

    def _arguments(self, a: fx.Node, b: fx.Node, biased: bool, eps: Epsilon | None) -> None:
        old, new, named = list(a.args), list(b.args), dict(a.kwargs)
        if eps is not None:
            old, named = (
                [with_epsilon(value, eps) for value in old],
                {key: with_epsilon(value, eps) for key, value in named.items()},
            )
        if biased:  # an absent bias is no argument at all, or None
            old, new = [*old[:2], *old[3:]], [*new[:2], *new[3:]]
        sizes = SIZES.get(name_of(a)) if self.changes.compressed else None
        for i, (x, y) in enumerate(zip(old, new, strict=False)):
            if not self._same(a, x, y, free=i == sizes):
                raise Differs(module_path(a), f"{operation(a)} has the argument {y}, not {x},{self.width}".rstrip(","))
        if len(old) != len(new) or not self._same(a, named, dict(b.kwargs)):
            raise Differs(module_path(a), f"{operation(a)} is called in another way{self.width}")

    def _same(self, at: fx.Node, a: Any, b: Any, free: bool = False) -> bool:
        if isinstance(a, fx.Node):
            return isinstance(b, fx.Node) and self._same_node(at, a, self._bare(b))
        if isinstance(a, (list, tuple)):
            same_length = isinstance(b, (list, tuple)) and len(a) == len(b)
            return same_length and all(self._same(at, x, y, free) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(self._same(at, a[k], b[k]) for k in a)
        if free and isinstance(a, int) and isinstance(b, int):
            return True
        return same_number(a, b)

    def _same_node(self, at: fx.Node, a: fx.Node, b: fx.Node) -> bool:
        old, new = self.old.parameters.get(a), self.new.parameters.get(b)
        if old and new and not self.changes.untied.keys().isdisjoint(old.aliases):
            # A table that is untied: each of its two readers has the name that is its own.
            return f"{module_path(at)}.weight" in new.aliases
        return self._image_of(a) is b

    def _shapes(self, a: fx.Node, b: fx.Node) -> None:
        old, new = tensors_of(a), tensors_of(b)
        if len(old) != len(new):
            raise Differs(module_path(a), f"{operation(a)} has other results{self.width}")
        for x, y in zip(old, new, strict=True):
            if x.dtype != y.dtype and not (self.changes.rewritten and x.is_floating_point() and y.is_floating_point()):
                raise Differs(module_path(a), f"{operation(a)} is {y.dtype}, not {x.dtype},{self.width}".rstrip(","))
            expected, shape = narrowed(sizes_of(x), self.places.get(a, ())), sizes_of(y)
            if expected != shape and not self._constant(a, sizes_of(x), shape):
                wrong = f"{operation(a)} has the shape {list(shape)}{self.width}, not {list(expected)}"
                raise Differs(module_path(a), wrong)
        if a not in self.constant:
            for source in a.all_input_nodes if self.constant else ():
                if source in self.constant and not self._aligned(a, source):
                    raise Differs(module_path(a), f"{operation(a)} reads a mask of the new width")

    def _constant(self, a: fx.Node, old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
        """Whether a value outside the stream has fewer channels, and is the same in all of them."""
        dims = [d for d, (x, y) in enumerate(zip(old, new, strict=False)) if x != y]
        if len(old) != len(new) or len(dims) != 1 or self.places.get(a) or isinstance(a.meta.get("val"), (list, tuple)):
            return False
        (dim,) = dims
        if not self.changes.compressed or new[dim] != old[dim] - 1 or varies(a, ChannelAxis(dim, old[dim])):
            return False
        # Counted from the end, as broadcasting does: `_aligned` looks for it in a value of another rank.
        self.constant[a] = dim - len(old)
        return True

    def _aligned(self, a: fx.Node, source: fx.Node) -> bool:
        """Whether ``a`` is compressed where ``source`` lies along it, or asks for no values."""
        axis = len(shape_of(a)) + self.constant[source]
        compressed = any(place.dim == axis and place.whole for place in self.places.get(a, ()))
        return name_of(a) in NEUTRAL or (name_of(a) in _ELEMENTWISE and compressed)

    def _outputs(self) -> None:
        """Every output must be the image of its own; a name may come back from each call of the model."""
        returned = Counter((name, self._bare(node)) for node, names in self.new.outputs.items() for name in names)
        for node, names in self.old.outputs.items():
            wanted = Counter((name, self.image.get(node)) for name in names)
            if self.places.get(node) or wanted - returned:
                raise Differs(module_path(node), f"the output {', '.join(names)} is another value")
            returned -= wanted
        if returned:
            raise Differs("", f"the output {', '.join(name for name, _ in returned)} is new")
