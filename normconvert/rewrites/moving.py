"""Moving an affine map a * x + b along the graph, to the linear maps that can take it.

To producers: x is made by linear maps W u + c, perhaps joined and rearranged on the way. a (W u + c) + b =
(diag(a) W) u + (a c + b). To consumers: all that is read of y = a * x + b is read by linear maps: W y + c =
(W diag(a)) x + (W b + c). Between the two stand operations that treat every channel alike; a scale passes through every
one of them, a shift only through those that leave a constant as it is (I2: an average does, a zero padding does not).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normconvert.analysis.affine_norms import Affine, Call
from normconvert.analysis.channel_axes import ChannelAxis, carry_forward, shape_of
from normconvert.analysis.op_table import carried, terms_of
from normconvert.analysis.streams import operation
from normconvert.plan.vectors import Expression, part, times
from normconvert.rewrites.linear_maps import (
    LINEAR,
    Blocked,
    Share,
    is_input,
    share_of,
)
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import CONCATENATIONS, argument, keeps_constants, name_of, readers


@dataclass
class Settled:
    """A graph, and what earlier decisions have made of it.

    Attributes:
        graph: the model's.
        merged: operations of blocks that become one convolution.
        gone: result of an affine norm that has moved -> the norm's call.
        results: input of an affine norm that has moved -> its result.
        passed: input of an affine norm that has moved behind -> where it carries the channels, and its scale.
    """

    graph: Graph
    merged: frozenset[fx.Node] = frozenset()
    gone: dict[fx.Node, Call] = field(default_factory=dict)
    results: dict[fx.Node, fx.Node] = field(default_factory=dict)
    passed: dict[fx.Node, tuple[ChannelAxis, Expression]] = field(default_factory=dict)

    def take_away(self, norm: Affine, behind: bool) -> None:
        """Note that a norm has moved."""
        for call in norm.calls:
            self.gone[call.result] = call
            self.results[call.source] = call.result
            if behind:
                self.passed[call.source] = call.axis, norm.scale


@dataclass
class Walk:
    """A move of one call of an affine norm: the linear maps that take it, and all values that change.

    Attributes:
        settled: the graph.
        shifts: to consumers, there is a shift to be moved, too.
        shares: what is found.
        changed: what is found, in order: the first that stands in the way is the reason that a user reads.
    """

    settled: Settled
    shifts: bool = True
    shares: list[Share] = field(default_factory=list)
    changed: dict[fx.Node, None] = field(default_factory=dict)

    def to_producers(self, node: fx.Node, axis: ChannelAxis, channels: tuple[int, int], shift: bool = True) -> None:
        """Move the scale, and the shift if ``shift``, into what makes the value at ``node``.

        Raises:
            Blocked: the value is made by what cannot take the map.
        """
        self._enter(node)
        self._stop_at_merged(node)
        if node in self.settled.gone:  # nothing is left of a norm that has moved
            self.to_producers(self.settled.gone[node].source, axis, channels, shift)
        elif name_of(node) in LINEAR:
            self.shares.append(share_of(self.settled.graph, node, node, axis, 0, channels, shift))
        elif _joins(node, axis):
            self._to_parts(node, axis, channels, shift)
        else:
            for operand, at in self._operands(node, axis, shift):
                self.to_producers(operand, at, channels, shift)
                # A sum needs the shift once. The second operand may have a sign or a factor (sub, alpha): a scale
                # passes it, a shift would be multiplied.
                shift = False

    def _to_parts(self, node: fx.Node, axis: ChannelAxis, channels: tuple[int, int], shift: bool) -> None:
        """Through a concatenation of channels: every part takes its own."""
        if axis.outer != 1:
            raise Blocked(f"{operation(node)} interleaves channels", "cut")
        start = channels[0]
        parts: Any = node.args[0]
        for piece in parts:
            length = shape_of(piece)[axis.dim]
            if length % axis.inner:
                raise Blocked(f"{operation(node)} cuts a channel", "cut")
            size = length // axis.inner
            self.to_producers(piece, replace(axis, size=size), (start, start + size), shift)
            start += size

    def _operands(self, node: fx.Node, axis: ChannelAxis, shift: bool) -> list[tuple[fx.Node, ChannelAxis]]:
        """What a value is made of, if the map passes through: values, and where they carry the channels."""
        if node.op != "call_function":
            raise Blocked(f"it reads {operation(node)}", "input")
        terms = terms_of(node)
        between = f"{operation(node)} stands between it and a linear map"
        if terms is None:
            raise Blocked(between, "unknown-op")
        found: list[tuple[fx.Node, ChannelAxis]] = []
        for term in terms:
            carriers = [(o, p) for o in term if (p := carried(o, axis, node)) is not None]
            if len(carriers) != 1 or not carriers[0][0].linear:
                raise Blocked(between, "product")
            found.append((carriers[0][0].node, carriers[0][1]))
        is_sum = name_of(node) in ("aten.add", "aten.sub")
        if shift and not (is_sum or keeps_constants(node)):
            raise Blocked(f"{operation(node)} does not leave a constant as it is", "not-constant")
        if len(found) > 1 and not is_sum:
            raise Blocked(between, "unknown-op")
        return found

    def to_consumers(self, node: fx.Node, axis: ChannelAxis, start: int, count: int, factor: Expression = 1) -> None:
        """Move into all that reads the value at ``node``: channels ``start`` to ``start + count`` at ``axis``.

        ``factor`` is what norms that have moved behind, on the way here, multiply those channels by.

        Raises:
            Blocked: something reads it that cannot take the map.
        """
        self._enter(node)
        for user in readers(node):
            if user.op == "output":
                names = ", ".join(f"`{n}`" for n in self.settled.graph.outputs.get(node, ())) or "an output"
                raise Blocked(f"the model returns it as {names}", "returned")
            self._stop_at_merged(user)
            if user in self.settled.results:
                # Who reads the input of a norm that has moved is its result, one operation further on.
                self._enter(user)
                behind = self._scaled(user, axis, start, count, factor)
                self.to_consumers(self.settled.results[user], axis, start, count, behind)
            elif name_of(user) in LINEAR and is_input(user, node):
                share = share_of(self.settled.graph, user, node, axis, start, (0, count), self.shifts)
                self.shares.append(replace(share, factor=factor))
            else:
                at, offset = self._passes(user, node, axis, start)
                self.to_consumers(user, at, offset, count, factor)

    def _enter(self, node: fx.Node) -> None:
        """Note that a value changes."""
        self.changed[node] = None
        stop_at_exit(self.settled.graph, node)

    def _stop_at_merged(self, node: fx.Node) -> None:
        if node in self.settled.merged:
            raise Blocked(f"{operation(node)} is merged with the branches beside it", "merged-branch")

    def _scaled(self, source: fx.Node, axis: ChannelAxis, start: int, count: int, factor: Expression) -> Expression:
        """The factor behind a norm that has moved behind."""
        if source not in self.settled.passed:
            raise Blocked(f"{operation(source)} has moved before what makes it", "unknown-op")
        along, scale = self.settled.passed[source]
        if along != axis:
            raise Blocked(f"{operation(source)} scales it along other axes", "axes")
        return times(factor, part(scale, start, start + count, axis.size))

    def _passes(self, user: fx.Node, node: fx.Node, axis: ChannelAxis, start: int) -> tuple[ChannelAxis, int]:
        """Where a reader that treats every channel alike takes the channels, and the first of them."""
        stop = Blocked(f"{operation(user)} reads it", "unknown-op")
        if name_of(user) in CONCATENATIONS:
            parts: Any = user.args[0]
            if not _joins(user, axis) or axis.outer != 1 or sum(p is node for p in parts) != 1:
                raise stop
            before: Any = sum(shape_of(p)[axis.dim] for p in parts[: list(parts).index(node)])
            total = shape_of(user)[axis.dim]
            if before % axis.inner or total % axis.inner:
                raise Blocked(str(stop), "cut")
            return replace(axis, size=total // axis.inner), start + before // axis.inner
        terms = terms_of(user)
        # More than one term is a sum, whose other part would have to be scaled as well.
        if terms is None or (self.shifts and not keeps_constants(user)) or len(terms) != 1:
            raise stop
        operands = [o for o in terms[0] if o.node is node]
        if len(operands) != 1 or not operands[0].linear:
            raise stop
        at = carry_forward(operands[0], axis, user)
        if at is None:
            raise Blocked(f"{operation(user)} takes its channels apart", "cut")
        for other in terms[0]:
            if other is not operands[0] and carried(other, at, user):
                raise Blocked(f"{operation(user)} multiplies it channel by channel", "product")
        return at, start


def stop_at_exit(graph: Graph, node: fx.Node) -> None:
    """Raise Blocked if the value at ``node`` is returned as features."""
    if names := graph.exits.get(node):
        raise Blocked(f"{', '.join(f'`{name}`' for name in names)} returns it", "features")


def _joins(node: fx.Node, axis: ChannelAxis) -> bool:
    """Whether a value is a concatenation of channels."""
    return name_of(node) in CONCATENATIONS and int(argument(node, 1, "dim", 0)) % len(shape_of(node)) == axis.dim


def into_producers(norm: Affine, settled: Settled) -> list[Share]:
    """The linear maps that make what every call of a norm reads, if nobody else sees it.

    Raises:
        Blocked: something else makes it, or sees it.
    """
    walks = [Walk(settled) for _ in norm.calls]
    for walk, call in zip(walks, norm.calls, strict=True):
        walk.to_producers(call.source, call.axis, (0, call.axis.size))
    changed = {n for walk in walks for n in walk.changed}
    # What a norm computes on the way is not used once it has moved.
    unused = [*norm.calls, *(call for result, call in settled.gone.items() if result in changed)]
    changed |= {n for call in unused for n in call.nodes}
    for node in (n for walk in walks for n in walk.changed):
        for user in readers(node):
            # The value changes for all its readers, so each has to be on the way.
            if user not in changed:
                stop_at_exit(settled.graph, user)
                if user.op == "output":
                    raise Blocked("the model returns what it reads", "returned")
                raise Blocked(f"{operation(user)} reads the same value", "read-elsewhere")
    return _agreed(walks)


def into_consumers(settled: Settled, starts: Iterable[tuple[fx.Node, ChannelAxis]], shifts: bool = True) -> list[Share]:
    """The linear maps that read values, one of every call, with the axes that carry the channels.

    Raises:
        Blocked: something else reads them.
    """
    walks = []
    for node, axis in starts:
        walk = Walk(settled, shifts)
        walk.to_consumers(node, axis, 0, axis.size)
        if not walk.shares:
            raise Blocked("nothing reads it", "unused")
        walks.append(walk)
    return _agreed(walks)


def _agreed(walks: list[Walk]) -> list[Share]:
    """The shares of all calls, one a weight; all calls of a weight must take part, and ask for the same."""
    nodes = {share.node for walk in walks for share in walk.shares}
    by_weight: dict[str, Share] = {}
    for walk in walks:
        seen: set[str] = set()
        for share in walk.shares:
            if outside := next((n for n in share.calls if n not in nodes), None):
                raise Blocked(f"{operation(outside)} uses `{share.weight}`, too", "shared-weight")
            other = by_weight.setdefault(share.weight, share)
            # Twice in one call: the tensor would be edited twice.
            if other.recipe != share.recipe or share.weight in seen:
                raise Blocked(f"`{share.weight}` is used in different ways", "shared-weight")
            seen.add(share.weight)
    # An edit is seen by every call, also by one whose norm has not asked for it.
    if any({s.weight for s in walk.shares} != set(by_weight) for walk in walks):
        raise Blocked("its calls read different linear maps", "shared-weight")
    return list(by_weight.values())
