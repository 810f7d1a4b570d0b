"""Graph -> streams: maximal sets of values joined by operations that treat every channel alike.

A stream is grown from a norm's input, both ways along the op table: back to what its values are made of, on to
who reads them. Values that depend on parameters alone (position embeddings, weights before a linear map) are members
when a stream is made of them, but are not followed onwards: who else reads a parameter is asked of the parameter
(`other_readers`), so that an embedding table that is also the output head is a tied parameter and no leak of the
stream.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from normconvert.analysis.channel_axes import ChannelAxis, NoPlace, Operand, Term, carry_back, carry_forward, shape_of
from normconvert.analysis.handwritten import Forms
from normconvert.analysis.norms import Norm
from normconvert.analysis.op_table import carried, terms_of
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import unmarked
from normconvert.tracing.live_values import dropped_values, live_values
from normconvert.tracing.operations import EMBEDDING, GETITEM, LINEAR_MAPS, name_of, readers

AxisRef = tuple[fx.Node, ChannelAxis]
"""A value and where it carries the channels."""


@dataclass(frozen=True)
class Provenance:
    """What a member is made of.

    Attributes:
        kind: ``parameter`` (a tensor of the checkpoint), ``sum`` (linear in ``parts``), ``scale`` (parts[0] times the
            parameter parts[1], channel by channel), ``norm`` or ``opaque`` (nothing can be moved into either).
        parts: the members it is linear in.
        rest: a clause that says what is added besides the parts, so that the sum is not mean-free; empty if nothing.
        reason: what it is, in words, if nothing can be moved into it.
    """

    kind: str
    parts: tuple[AxisRef, ...] = ()
    rest: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Leak:
    """A reader that sees more of the stream than a norm does.

    Attributes:
        ref: the value that is read.
        reader: the node that reads it.
        code: ``returned``, ``linear``, ``product``, ``norm-axes``, ``unknown-op``, ``unreached``, ``cut``
            or ``features``.
        reason: one clause in words.
    """

    ref: AxisRef
    reader: fx.Node
    code: str
    reason: str


@dataclass
class Stream:
    """A stream with ``size`` channels: its members and what they are made of, its norms and its leaks.

    ``centred``: who reads x - mean(x), which is no leak where the mean alone changes.
    """

    size: int
    members: dict[AxisRef, Provenance] = field(default_factory=dict)
    norms: list[tuple[Norm, AxisRef]] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    centred: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Use:
    """Where one reader takes a value: ``to`` the next ref, or a norm, a leak, or (all None) nowhere that matters.

    ``centred`` reads it without its mean: that matters where more than the mean changes.
    """

    to: AxisRef | None = None
    norm: Norm | None = None
    leak: Leak | None = None
    centred: fx.Node | None = None


class Analysis:
    """The streams of a graph, and the questions a rewrite asks of them."""

    def __init__(self, graph: Graph, norms: list[Norm], *, mean_only: bool = True) -> None:
        """Grow the streams that ``norms`` read.

        Args:
            graph: the model.
            norms: what :func:`normconvert.analysis.norms.find_norms` found in it.
            mean_only: the mean of a stream is all that is to change, so that x - mean(x) may be read by anybody; else
                the norms alone may read a stream.
        """
        self.graph = graph
        self.norms = norms
        self._mean_only = mean_only
        self._inside = {(node, norm.source): norm for norm in norms for node in norm.inside}
        self._reads = {norm.read: norm for norm in norms}
        self._forms = Forms(graph.nodes)
        self._made_by = {norm.result: norm for norm in norms}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self.data = self._data_dependent()
        self.live = live_values(graph.nodes, graph.ways_out, graph.parameters.keys())
        self._dropped = self._dropped_by_shape()
        self.streams: list[Stream] = []
        self.stream_of: dict[AxisRef, Stream] = {}
        places: dict[fx.Node, list[ChannelAxis]] = defaultdict(list)
        for norm in norms:
            if norm.place is not None and not any(self._sees(norm, at) for at in places[norm.source]):
                # Norms that read one stream find it grown by the first of them.
                stream = self.grow((norm.source, norm.place))
                self.streams.append(stream)
                self.stream_of.update(dict.fromkeys(stream.members, stream))
                for node, place in stream.members:
                    places[node].append(place)
        self._mark_returned_twice()
        self._mark_norms_of_several()

    def _mark_norms_of_several(self) -> None:
        """A norm over several values side by side, of which one is a stream's in itself, would see two changes."""
        read: dict[Norm, set[ChannelAxis]] = defaultdict(set)
        for stream in self.streams:
            for norm, ref in stream.norms:
                read[norm].add(ref[1])
        for stream in self.streams:
            for norm, ref in stream.norms:
                if len(read[norm]) > 1:
                    why = f"the norm {described(norm.path)} reads it as channels of two kinds"
                    leak = Leak(ref, norm.read, "norm-axes", why)
                    stream.leaks += [leak] if leak not in stream.leaks else []

    def _mark_returned_twice(self) -> None:
        """Who lets a returned value lose its mean thinks of channels along one dimension; x^T x has them along two."""
        refs = {ref for stream in self.streams for ref in stream.members}
        counts = Counter(node for node, _ in refs)
        for stream in self.streams:
            stream.leaks = [
                replace(leak, code="product", reason=f"{leak.reason}, with channels along two of its dimensions")
                if leak.code == "returned" and counts[leak.ref[0]] > 1
                else leak
                for leak in stream.leaks
            ]

    def _data_dependent(self) -> set[fx.Node]:
        """Nodes that depend on what the user feeds the model."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if node not in self.graph.parameters:
                    found.add(node)
            elif any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _dropped_by_shape(self) -> dict[tuple[int, ...], fx.Node]:
        """A value that nothing reads, of each shape; what a norm gives is no part of a residual stream."""
        found: dict[tuple[int, ...], fx.Node] = {}
        normed = {node for norm in self.norms for node in (norm.result, norm.output)}
        for node in dropped_values(self.graph.nodes, self.graph.ways_out, self.graph.parameters.keys()):
            if unmarked(node) not in normed and isinstance(node.meta.get("val"), Tensor):
                found.setdefault(tuple(shape_of(node)), node)
        return found

    def grow(self, start: AxisRef, ends: Collection[fx.Node] = ()) -> Stream:
        """The stream through ``start``, its members in execution order; not what values at ``ends`` are made of."""
        stream = Stream(size=start[1].size)
        work, leaks = [start], {}
        while work:
            ref = work.pop()
            if ref in stream.members:
                continue
            made = stream.members[ref] = self.provenance(ref) if ref[0] not in ends else Provenance("sum")
            # A layer scale times a mean-free value is not mean-free: what it multiplies is no part of this stream.
            work += made.parts if made.kind == "sum" else ()
            if ref[0] not in self.data and ref != start:
                if not self._mean_only:  # a norm of it sees more change than the mean, and needs to be asked
                    stream.norms += [(use.norm, ref) for use in self.uses(ref) if use.norm is not None]
                continue
            for use in self.uses(ref):
                if use.to is not None:
                    work.append(use.to)
                elif use.norm is not None:
                    stream.norms.append((use.norm, ref))
                elif use.leak is not None:
                    leaks[(use.leak.reader, use.leak.code)] = use.leak
                elif use.centred is not None:
                    stream.centred.append(use.centred)
        # In execution order the parts of a member come before it, and one pass decides what is mean-free.
        stream.members = dict(sorted(stream.members.items(), key=lambda item: self._order[item[0][0]]))
        if name := next(self.doubts(stream), None):
            why = f"{name} fits this stream, and no traced input makes the model use it"
            leaks[(start[0], "unread")] = Leak(start, start[0], "unread", why)
        # What does read the stream is the better reason, and comes before what merely could write into it.
        stream.leaks = sorted(leaks.values(), key=lambda leak: (leak.code == "unread", self._order[leak.reader]))
        stream.norms.sort(key=lambda pair: self._order[pair[0].result])
        return stream

    def doubts(self, stream: Stream) -> Iterator[str]:
        """What another call might write into a stream: tensors that none reads, values that none goes on with."""
        if self.graph.unread_is_unused:
            return
        yield from (f"`{name}`" for name in unreached_that_fit(self.graph, stream.size))
        shapes = dict.fromkeys(tuple(shape_of(node)) for node, _ in stream.members if node in self.data)
        for shape in shapes.keys() & self._dropped.keys():
            yield f"what {operation(unmarked(self._dropped[shape]))} gives"

    def norm_of(self, node: fx.Node) -> Norm | None:
        """The norm whose normalised value a value is."""
        return self._made_by.get(node)

    def provenance(self, ref: AxisRef) -> Provenance:
        """What the value at ``ref`` is made of."""
        node, place = ref
        if node.op == "placeholder":
            parameter = self.graph.parameters.get(node)
            if parameter is None:
                return Provenance("opaque", reason=f"the model's input `{node.name}`")
            if not parameter.stored:
                return Provenance("opaque", reason=f"the constant `{parameter.name}`, which no checkpoint holds")
            return Provenance("parameter")
        # Before the table is asked: a norm written by hand is a product, and would be taken for one.
        if node in self._made_by:
            return Provenance("norm", reason=f"the output of the norm {described(self._made_by[node].path)}")
        terms = terms_of(node)
        if terms is None:
            return Provenance("opaque", reason=f"the result of {operation(node)}")
        parts: list[AxisRef] = []
        rest = ""
        for term in terms:
            carriers = [(o, p) for o in term if (p := carried(o, place, node)) is not None]
            if not carriers:
                lost = any(carry_back(o, place, node) is NoPlace.LOST for o in term)
                rest = "which takes channels apart" if lost else rest or "which adds the same number to all channels"
            elif len(carriers) == 1 and carriers[0][0].linear:
                parts.append((carriers[0][0].node, carriers[0][1]))
            elif scale := self._layer_scale(terms, carriers):
                return scale
            else:
                return Provenance("opaque", reason=f"a product that differs by channel, {operation(node)}")
        return Provenance("sum", tuple(parts), rest)

    def _layer_scale(self, terms: tuple[Term, ...], carriers: list[tuple[Operand, ChannelAxis]]) -> Provenance | None:
        """``value * parameter``, channel by channel, with the parameter second in ``parts``."""
        if len(terms) != 1 or len(carriers) != 2 or not all(o.linear for o, _ in carriers):
            return None
        # Only a factor of parameters alone can move into a weight; a gate that the input opens cannot.
        fixed = [(o, p) for o, p in carriers if o.node not in self.data]
        moving = [(o, p) for o, p in carriers if o.node in self.data]
        if len(fixed) != 1 or len(moving) != 1:
            return None
        (value, value_place), (factor, factor_place) = moving[0], fixed[0]
        return Provenance("scale", ((value.node, value_place), (factor.node, factor_place)))

    def uses(self, ref: AxisRef) -> Iterator[Use]:
        """Where each reader of the value at ``ref`` takes it."""
        node, place = ref
        exits = self.graph.exits.get(node)
        # What a module gives is captured on its way; of parameters alone, it is returned by what is made of it.
        if exits and (node in self.data or any(user.op == "output" for user in readers(node))):
            why = f"{', '.join(f'`{exit_}`' for exit_ in exits)} returns it"
            yield Use(leak=Leak(ref, node, "features", why))
        for user in readers(node):
            if user not in self.live:
                continue
            if user.op == "output":
                if exits and node not in self.graph.outputs:
                    continue  # a method of features returns it, which is said above
                names = ", ".join(f"`{n}`" for n in self.graph.outputs.get(node, ())) or "an output"
                yield Use(leak=Leak(ref, user, "returned", f"the model returns it as {names}"))
            # The same node reads the norm's weight and bias, and those not through P: hence the question for the
            # source.
            elif (norm := self._reads.get(user)) is not None and norm.source is node:
                if self._sees(norm, place):
                    yield Use(norm=norm)
                else:
                    why = f"the norm {described(norm.path)} reads it over other axes"
                    yield Use(leak=Leak(ref, user, "norm-axes", why))
            # Between a norm's source and its result, from where it goes nowhere else; or x - mean(x), which stays as it
            # is when the mean of x changes, whether a norm follows or not.
            elif (norm := self._inside.get((user, node))) is not None and self._sees(norm, place):
                yield Use()
            elif self._mean_only and self._forms.reads_centred(user, node, place):
                yield Use(centred=user)
            else:
                yield from self._through(user, ref)

    def _sees(self, norm: Norm, place: ChannelAxis) -> bool:
        """Whether a norm reads channels at a place in its source as a stream's norm: over these, or over several such.

        Several values of a stream beside each other (neighbouring patches) have one mean and one size, which no
        orthogonal map of each that keeps 1 changes, and a number changes as it does theirs. Without the mean of each
        one they are others, unlike the values themselves.
        """
        over = norm.place
        if over == place or over is None or self._mean_only or not over.whole or over.dim != place.dim:
            return over == place
        return bool(over.size == place.outer * place.size * place.inner)

    def _through(self, user: fx.Node, ref: AxisRef) -> Iterator[Use]:
        node = ref[0]
        terms = terms_of(user)
        if terms is None:
            yield Use(leak=Leak(ref, user, "unknown-op", f"{operation(user)} reads it"))
            return
        # An operand that the rule does not name (the value of a masked_fill, an index) is used in a way nobody
        # described.
        if not any(operand.node is node for term in terms for operand in term):
            yield Use(leak=Leak(ref, user, "unknown-op", f"{operation(user)} reads it"))
        for term in terms:
            for operand in term:
                if operand.node is node:
                    yield self._step(user, term, operand, ref)

    def _step(self, user: fx.Node, term: Term, operand: Operand, ref: AxisRef) -> Use:
        place = carry_forward(operand, ref[1], user) if operand.linear else None
        if place is None:
            is_map = name_of(user) in LINEAR_MAPS and operand.linear
            code = "linear" if is_map else "cut" if operand.linear else "unknown-op"
            verb = "reads it directly" if is_map else "takes its channels apart" if operand.linear else "reads it"
            return Use(leak=Leak(ref, user, code, f"{operation(user)} {verb}"))
        # gamma * x hides the mean of x behind gamma, from where no P removes it again.
        if any(other is not operand and carried(other, place, user) for other in term):
            return Use(leak=Leak(ref, user, "product", f"{operation(user)} multiplies it channel by channel"))
        return Use(to=(user, place))

    def add_written(self) -> None:
        """Add the streams without norms that tensors of the others write: what a further call returns, say.

        A tensor can only change if all that it writes does; what is no stream would keep it as it is.
        """
        work = [ref for stream in self.streams for ref, made in stream.members.items() if made.kind == "parameter"]
        seen = set(work)
        while work:
            for use in self.uses(work.pop()):
                if use.to is None or use.to in seen or use.to in self.stream_of:
                    continue
                seen.add(use.to)
                if use.to[0] not in self.data:
                    work.append(use.to)
                    continue
                stream = self.grow(use.to)
                self.streams.append(stream)
                self.stream_of.update(dict.fromkeys(stream.members, stream))
                work += [ref for ref, made in stream.members.items() if made.kind == "parameter" and ref not in seen]
                seen |= stream.members.keys()
        self._mark_norms_of_several()

    def other_readers(
        self, ref: AxisRef, allowed: Callable[[AxisRef], bool], *, norms_too: bool = False
    ) -> Iterator[fx.Node]:
        """The readers of a parameter (followed through values made of parameters alone) that are not ``allowed``.

        A reader is fine if it takes the parameter to a ref for which ``allowed`` holds, or if it is a norm: one never
        sees a mean. Where more is to change than that, a norm is fine if what it reads is allowed, and with
        ``norms_too`` none is.
        """
        for use in self.uses(ref):
            if use.leak is not None:
                yield use.leak.reader
            elif use.norm is not None and (norms_too or (not self._mean_only and not allowed(ref))):
                yield use.norm.read
            elif use.centred is not None and norms_too:
                yield use.centred
            elif use.to is not None and use.to[0] not in self.data:
                # Even if it is a member: `grow` does not look for its other readers.
                yield from self.other_readers(use.to, allowed, norms_too=norms_too)
            elif use.to is not None and not allowed(use.to):
                yield use.to[0]


def unreached_that_fit(graph: Graph, size: int) -> Iterator[str]:
    """The tensors that no traced call reads, and that could be written into a stream of ``size`` channels as they are.

    A view makes a channel axis of any dimensions, or of a part of one, so it is the number of elements that counts:
    of another number nothing but a slice, a repetition or a sum with something else fills the channels.
    """
    counts = ((name, math.prod(shape)) for name, shape in graph.unreached.items())
    return (name for name, count in counts if count and count % size == 0)


def described(path: str) -> str:
    """A module path for a sentence."""
    return f"`{path}`" if path else "of the model itself"


def operation(node: fx.Node) -> str:
    """An operation and the module that runs it, for a sentence: ``aten.gelu in `encoder```."""
    if name_of(node) == GETITEM:  # one result of several: name what made it
        node = node.all_input_nodes[0]
    path = module_path(node)
    name = name_of(node).removeprefix("aten.")
    if node.op == "placeholder":
        return f"the input `{node.name}`"
    if name_of(node) in LINEAR_MAPS or name_of(node) == EMBEDDING:
        return f"`{path}`" if path else name
    return f"{name} in `{path}`" if path else f"{name} in the model's own forward"


def spans(ref: AxisRef) -> bool:
    """Whether the channels are one whole dimension of the value."""
    return ref[1].whole and shape_of(ref[0])[ref[1].dim] == ref[1].size
