"""Moving an affine map a * x + b along the graph, to the linear maps that can take it.

Backwards: x is made by linear maps W u + c, perhaps joined and rearranged on the way. a (W u + c) + b =
(diag(a) W) u + (a c + b). Forwards: all that is read of y = a * x + b is read by linear maps: W y + c =
(W diag(a)) x + (W b + c). Between the two stand operations that treat every channel alike; a scale passes through every
one of them, a shift only through those that leave a constant as it is (I2: an average does, a zero padding does not).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import Place, carry_back, carry_forward, shape_of
from normconvert.analysis.op_table import carried, terms_of
from normconvert.analysis.operations import (
    CONVOLUTIONS,
    COPIES,
    MOVES,
    NEUTRAL,
    TRANSPOSED,
    argument,
    keeps_constants,
    name_of,
)
from normconvert.analysis.streams import operation
from normconvert.plan.vectors import Expression, part, times
from normconvert.rewrites.linear_maps import (
    LINEAR,
    Blocked,
    NoBias,
    check_borders,
    groups_of,
    is_input,
    weight_and_bias,
)
from normconvert.tracing.graph import Graph


@dataclass(frozen=True)
class Share:
    """One linear map's part of a move.

    Attributes:
        node: the linear map.
        weight: name of its weight.
        axis: dimension of the weight that holds the channels; ``out`` the one of its results.
        outer: further factors of that dimension (see `Place`), as ``inner``.
        start: forwards, the first of its channels that is scaled.
        channels: backwards, which of the affine map's channels it takes: (start, stop).
        groups: as in `normconvert.plan.edits`, where dimension 1 continues dimension 0.
        bias: name of its bias; None if it has none.
        outputs: length of the bias.
        shifted: whether it takes the shift, too.
        calls: all nodes that read the weight or the bias.
        factor: forwards, what norms on the way multiply the affine map's channels by.
    """

    node: fx.Node
    weight: str
    axis: int
    out: int
    outer: int
    inner: int
    start: int
    channels: tuple[int, int]
    groups: int
    bias: str | None
    outputs: int
    shifted: bool
    calls: frozenset[fx.Node]
    factor: Expression = 1

    @property
    def recipe(self) -> tuple[Any, ...]:
        """All but the node: equal for two calls that ask the same of the weight."""
        return tuple(v for k, v in self.__dict__.items() if k != "node")


@dataclass
class Walk:
    """A move of one call of an affine norm: the linear maps that take it, and all values that change.

    Attributes:
        graph: the model's.
        gone: result of an affine norm that has moved -> its input.
        merged: operations of blocks that become one convolution.
        passed: input of an affine norm that has moved behind -> where it carries the channels, and its scale.
        shifts: forwards, there is a shift to be moved, too.
        shares: what is found.
        changed: what is found.
    """

    graph: Graph
    gone: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    merged: frozenset[fx.Node] = frozenset()
    passed: Mapping[fx.Node, tuple[Place, Expression]] = field(default_factory=dict)
    shifts: bool = True
    shares: list[Share] = field(default_factory=list)
    changed: set[fx.Node] = field(default_factory=set)

    def back(self, node: fx.Node, place: Place, channels: tuple[int, int], shift: bool) -> bool:
        """Move into what makes the value at ``node``; returns whether the shift has found its place.

        Raises:
            Blocked: the value is made by what cannot take the map.
        """
        self.changed.add(node)
        self.stop_at_exit(node)
        if node in self.merged:
            raise Blocked(f"{operation(node)} is merged with the branches beside it", "merged-branch")
        if node in self.gone:  # an affine norm that has moved before: nothing is left of it
            return self.back(self.gone[node], place, channels, shift)
        name = name_of(node)
        if name in LINEAR:
            self.shares.append(self._output_side(node, place, channels, shift))
            return shift
        if name in ("aten.cat", "aten.concat", "aten.concatenate"):
            dim = int(argument(node, 1, "dim", 0)) % len(shape_of(node))
            if dim == place.dim:
                return self._back_parts(node, place, channels, shift)
        operands = self._operands(node, place, shift)
        taken = False
        for operand, at, positive in operands:
            wanted = shift and not taken and positive
            known = len(self.shares)
            try:
                taken = self.back(operand, at, channels, wanted) or taken
            except NoBias:
                # Once more without the shift. What was found to change stays noted: it changes in either case.
                del self.shares[known:]
                self.back(operand, at, channels, False)
        if shift and not taken:
            raise NoBias(f"nothing that {operation(node)} adds up has a bias to take the shift", "no-bias")
        return taken

    def stop_at_exit(self, node: fx.Node) -> None:
        """Raise Blocked if the value at ``node`` is returned as features."""
        if names := self.graph.exits.get(node):
            raise Blocked(f"{', '.join(f'`{name}`' for name in names)} returns it", "features")

    def _back_parts(self, node: fx.Node, place: Place, channels: tuple[int, int], shift: bool) -> bool:
        """Through a concatenation of channels: every part takes its own."""
        if place.outer != 1:
            raise Blocked(f"{operation(node)} interleaves channels", "cut")
        start = channels[0]
        for piece in node.args[0]:  # type: ignore[union-attr]
            length = shape_of(piece)[place.dim]
            if length % place.inner:
                raise Blocked(f"{operation(node)} cuts a channel", "cut")
            size = length // place.inner
            if not self.back(piece, replace(place, size=size), (start, start + size), shift) and shift:  # type: ignore[arg-type]
                raise NoBias(f"a part of {operation(node)} has no bias to take the shift", "no-bias")
            start += size
        return shift

    def _operands(self, node: fx.Node, place: Place, shift: bool) -> list[tuple[fx.Node, Place, bool]]:
        """What a value is made of, if the map passes through: (value, place, whether it enters with weight one)."""
        terms = terms_of(node)
        name = name_of(node)
        if node.op != "call_function":
            raise Blocked(f"it reads {operation(node)}", "input")
        if terms is None:
            raise Blocked(f"{operation(node)} stands between it and a linear map", "unknown-op")
        found: list[tuple[fx.Node, Place, bool]] = []
        for term in terms:
            carriers = [(o, p) for o in term if (p := carried(o, place, node)) is not None]
            if len(carriers) != 1 or not carriers[0][0].linear:
                raise Blocked(f"{operation(node)} stands between it and a linear map", "product")
            # The second operand may have a sign or a factor (sub, alpha): a scale passes it, a shift would be
            # multiplied.
            found.append((carriers[0][0].node, carriers[0][1], len(found) == 0))
        sum_of = name in ("aten.add", "aten.sub")
        if shift and not (sum_of or keeps_constants(node)):
            raise Blocked(f"{operation(node)} does not leave a constant as it is", "not-constant")
        if len(found) > 1 and not sum_of:
            raise Blocked(f"{operation(node)} stands between it and a linear map", "unknown-op")
        return found

    def ahead(self, node: fx.Node, place: Place, start: int, count: int, factor: Expression = 1) -> None:
        """Move into all that reads the value at ``node``: channels ``start`` to ``start + count`` at ``place``.

        ``factor`` is what norms that have moved behind, on the way here, multiply those channels by.

        Raises:
            Blocked: something reads it that cannot take the map.
        """
        self.changed.add(node)
        self.stop_at_exit(node)
        for user in node.users:
            name = name_of(user)
            if name in NEUTRAL or (name in ("aten.type_as", "aten.expand_as", "aten.view_as", "aten.reshape_as")
                                   and user.args[0] is not node):  # fmt: skip
                continue
            if user.op == "output":
                names = ", ".join(f"`{n}`" for n in self.graph.outputs.get(node, ())) or "an output"
                raise Blocked(f"the model returns it as {names}", "returned")
            if user in self.merged:
                raise Blocked(f"{operation(user)} is merged with the branches beside it", "merged-branch")
            if user in self.gone_inputs:
                # Who reads the input of a norm that has moved is its result, one operation further on.
                self.changed.add(user)
                self.stop_at_exit(user)
                self.ahead(self.gone_inputs[user], place, start, count, self._scaled(user, place, start, count, factor))
            elif name in LINEAR and is_input(user, node):
                self.shares.append(replace(self._input_side(user, node, place, start, count), factor=factor))
            else:
                at, offset = self._passes(user, node, place, start)
                self.ahead(user, at, offset, count, factor)

    def _scaled(self, source: fx.Node, place: Place, start: int, count: int, factor: Expression) -> Expression:
        """The factor behind a norm that has moved behind."""
        if source not in self.passed:
            raise Blocked(f"{operation(source)} has moved before what makes it", "unknown-op")
        along, scale = self.passed[source]
        if along != place:
            raise Blocked(f"{operation(source)} scales it along other axes", "axes")
        return times(factor, part(scale, start, start + count, place.size))

    @property
    def gone_inputs(self) -> Mapping[fx.Node, fx.Node]:
        """Input of an affine norm that has moved -> its output."""
        return {source: result for result, source in self.gone.items()}

    def _passes(self, user: fx.Node, node: fx.Node, place: Place, start: int) -> tuple[Place, int]:
        """Where a reader that treats every channel alike takes the channels."""
        name = name_of(user)
        stop = f"{operation(user)} reads it"
        if name in ("aten.cat", "aten.concat", "aten.concatenate"):
            dim = int(argument(user, 1, "dim", 0)) % len(shape_of(user))
            if dim == place.dim and place.outer == 1:
                parts: Any = user.args[0]
                if sum(p is node for p in parts) != 1:
                    raise Blocked(stop, "unknown-op")
                before: Any = sum(shape_of(p)[dim] for p in parts[: list(parts).index(node)])
                total = shape_of(user)[dim]
                if before % place.inner or total % place.inner:
                    raise Blocked(stop, "cut")
                return replace(place, size=total // place.inner), start + before // place.inner
            raise Blocked(stop, "unknown-op")
        terms = terms_of(user)
        # More than one term is a sum, whose other part would have to be scaled as well.
        if terms is None or (self.shifts and not keeps_constants(user)) or len(terms) != 1:
            raise Blocked(stop, "unknown-op")
        operands = [o for o in terms[0] if o.node is node]
        if len(operands) != 1 or not operands[0].linear:
            raise Blocked(stop, "unknown-op")
        at = carry_forward(operands[0], place, user)
        if at is None:
            raise Blocked(f"{operation(user)} takes its channels apart", "cut")
        for other in terms[0]:
            if other is not operands[0] and carried(other, at, user):
                raise Blocked(f"{operation(user)} multiplies it channel by channel", "product")
        return at, start

    def _output_side(self, node: fx.Node, place: Place, channels: tuple[int, int], shift: bool) -> Share:
        """A linear map whose results are scaled."""
        name = name_of(node)
        weight, bias = weight_and_bias(node)
        groups = 1
        if name in CONVOLUTIONS | TRANSPOSED:
            batched = len(shape_of(node)) == len(shape_of(weight))
            if place.dim != (1 if batched else 0):
                raise Blocked(f"it lies across the channels of {operation(node)}", "axes")
            axis = 1 if name in TRANSPOSED else 0
            # Dimension 0 of a plain convolution's weight has the results of all groups, dimension 1 of a transposed
            # one's those of one group only.
            groups = groups_of(node) if name in TRANSPOSED else 1
        else:
            if place.dim != len(shape_of(node)) - 1 or len(shape_of(weight)) != 2:
                raise Blocked(f"it lies across the channels of {operation(node)}", "axes")
            axis = 0 if name == "aten.linear" else 1
        if groups > 1 and not place.whole:
            raise Blocked(f"{operation(node)} has groups", "cut")
        outputs = int(shape_of(node)[place.dim])
        return self._share(node, weight, axis, bias, place, 0, channels, groups, outputs, shift)

    def _input_side(self, node: fx.Node, value: fx.Node, place: Place, start: int, count: int) -> Share:
        """A linear map that reads scaled and shifted values."""
        name = name_of(node)
        weight, bias = weight_and_bias(node)
        groups = 1
        if name in CONVOLUTIONS | TRANSPOSED:
            batched = len(shape_of(value)) == len(shape_of(weight))
            if place.dim != (1 if batched else 0):
                raise Blocked(f"{operation(node)} reads it along other axes", "axes")
            if self.shifts:
                check_borders(node, weight)
            axis = 0 if name in TRANSPOSED else 1
            groups = groups_of(node)
            outputs = int(shape_of(node)[place.dim])
        else:
            if place.dim != len(shape_of(value)) - 1 or len(shape_of(weight)) != 2:
                raise Blocked(f"{operation(node)} reads it along other axes", "axes")
            axis = 1 if name == "aten.linear" else 0
            outputs = int(shape_of(node)[-1])
        # A group's channels are numbered from the group's first, which only a whole axis tells.
        if groups > 1 and (not place.whole or count != place.size):
            raise Blocked(f"{operation(node)} has groups", "cut")
        return self._share(node, weight, axis, bias, place, start, (0, count), groups, outputs, self.shifts)

    def _share(
        self, node: fx.Node, weight: fx.Node, axis: int, bias: fx.Node | None, place: Place, start: int,
        channels: tuple[int, int], groups: int, outputs: int, shift: bool,
    ) -> Share:  # fmt: skip
        name, at, readers = self._parameter(weight, axis, node)
        bias_name = None
        if bias is not None:
            bias_name, _, more = self._parameter(bias, 0, node)
            readers = readers | more
            if len(shape_of(bias)) != 1:
                raise Blocked(f"{operation(node)} has a bias that is no vector", "not-a-module")
        elif shift and not self._can_gain_bias(node, name):
            raise NoBias(f"{operation(node)} has no bias to take the shift, and none can be added", "no-bias")
        return Share(
            node=node, weight=name, axis=at, out=1 - at, outer=int(place.outer), inner=int(place.inner), start=start,
            channels=channels, groups=groups, bias=bias_name, outputs=outputs, shifted=shift, calls=readers,
        )  # fmt: skip

    def _can_gain_bias(self, node: fx.Node, weight: str) -> bool:
        """Whether the weight is a module's, built without a bias; that the module adds one is proved afterwards."""
        owner, _, leaf = weight.rpartition(".")
        module = self.graph.modules.get(owner)
        return module is not None and leaf == "weight" and "bias" in module._parameters and module.bias is None

    def _parameter(self, node: fx.Node, axis: int, reader: fx.Node) -> tuple[str, int, frozenset[fx.Node]]:
        """The stored parameter behind an operand: its name, the dimension that ``axis`` is there, all its readers."""
        place = Place(axis, int(shape_of(node)[axis]))
        while True:
            parameter = self.graph.parameters.get(node)
            if parameter is not None:
                # The plan names no aliases: an edit by one name would leave the tensor as it was under the others.
                if not parameter.stored or len(parameter.aliases) > 1:
                    raise Blocked(f"the weight of {operation(reader)} is tied or not stored", "tied")
                return parameter.name, place.dim, frozenset(_linear_readers(node))
            terms = terms_of(node)
            plain = terms is not None and len(terms) == 1 and len(terms[0]) == 1
            back = carry_back(terms[0][0], place, node) if terms is not None and plain else None
            whole = isinstance(back, Place) and back.whole and name_of(node) in MOVES | COPIES | VIEWS
            if terms is None or not isinstance(back, Place) or not whole:
                raise Blocked(f"the weight of {operation(reader)} is computed", "computed-weight")
            node, place = terms[0][0].node, back


def agreed(walks: list[Walk]) -> list[Share]:
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


VIEWS = {"aten.t", "aten.view", "aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.flatten", "aten.mT"}


def _linear_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a parameter, through moves and copies."""
    for user in node.users:
        if name_of(user) in MOVES | COPIES | VIEWS:
            yield from _linear_readers(user)
        elif name_of(user) not in NEUTRAL:
            yield user
