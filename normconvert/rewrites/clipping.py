"""A norm between two non-linearities, the second a ReLU: its scale moves behind, and the ReLU begins elsewhere.

relu(a x + b) = a max(x + b / a, 0) for a > 0, and a min(x + b / a, 0) for a < 0. So an affine norm that can move
neither before nor behind, where every layer reads all earlier ones through a norm of its own, still vanishes: the
linear maps that read the ReLU take a, whatever they pad with zeros, and x + b / a is half a BatchNorm's work. The start
-b / a could move behind as well, max(x, -b / a) + b / a, and then no work would be left; but sums of what cancels again
lose digits (docs/design.md has figures). `normconvert.plan.vectors` says what the vectors are, with constant channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from normconvert.analysis.affine_norms import Affine, Call
from normconvert.analysis.channel_axes import shape_of
from normconvert.analysis.streams import operation
from normconvert.plan.vectors import Expression
from normconvert.rewrites.linear_maps import Blocked, Share
from normconvert.rewrites.moving import Settled, into_consumers, stop_at_exit
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARKER
from normconvert.tracing.operations import name_of, readers

TENSORS = ("start", "lower", "upper")
"""Names of the tensors of a clamp."""


@dataclass(frozen=True)
class Clamp:
    """The activation that one call of a norm ends in.

    Attributes:
        node: the operation.
        path: of the module that is the activation; None if it is the norm's child.
    """

    node: fx.Node
    path: str | None


@dataclass(frozen=True)
class Clipping:
    """A norm that becomes a clamp.

    Attributes:
        clamps: the activation behind each call.
        shape: of the clamp's vectors.
        like: the tensor beside which they are stored, in its dtype: the weight of a reader.
        vectors: ``scale`` for the readers, and those of the clamp.
        owned: what the norm reads is nobody else's, so that it may be written over.
    """

    clamps: tuple[Clamp, ...]
    shape: tuple[int, ...]
    like: str
    vectors: Mapping[str, Expression]
    owned: bool

    @property
    def activation(self) -> str | None:
        """The path of the activation's module, unless it is the norm's child."""
        return self.clamps[0].path

    def tensors(self, path: str) -> dict[str, list[dict[str, Any]]]:
        """The edits of the new tensors of the norm at ``path``."""
        new = {"op": "new", "shape": list(self.shape), "like": self.like}
        start = {"op": "shift", "by": self.vectors["start"], "axis": 0}
        bounds = {name: {"op": "bound", "by": self.vectors[name]} for name in ("lower", "upper")}
        return {f"{path}.{name}": [new, row] for name, row in {"start": start, **bounds}.items()}


def clamp_behind(graph: Graph, norm: Affine, call: Call) -> Clamp:
    """The clamp that alone reads what a call makes.

    Raises:
        Blocked: something else does.
    """
    node = call.result
    while True:
        stop_at_exit(graph, node)
        users = list(readers(node))
        if len(users) != 1:
            raise Blocked(f"{len(users)} operations read it" if users else "nothing reads it", "unknown-op")
        node = users[0]
        if node.op == "output":
            raise Blocked("the model returns it", "returned")
        if node.target is not MARKER:
            break
    if name_of(node) != "aten.relu":
        raise Blocked(f"{operation(node)} reads it", "unknown-op")
    path = module_path(node)
    inside = path.startswith(f"{norm.path}.")
    further = [u for u in node.users if u.target is not MARKER and module_path(u).startswith(f"{norm.path}.")]
    # A clamp takes the place of the norm or of the activation's module, and whatever else they run would be gone.
    if inside != bool(norm.keep) or further:
        raise Blocked(f"{operation(node)} is only a part of what runs there", "not-a-module")
    return Clamp(node, None if inside else path)


def clip(norm: Affine, settled: Settled) -> tuple[Clipping, list[Share]]:
    """What a norm becomes if it becomes a clamp, and the linear maps that take what is left.

    Raises:
        Blocked: it cannot.
    """
    graph = settled.graph
    clamps = tuple(clamp_behind(graph, norm, call) for call in norm.calls)
    if len({c.path for c in clamps}) > 1:
        raise Blocked("its calls end in different activations", "not-a-module")
    if clamps[0].path is not None:
        _check_module(graph, clamps[0].path, {c.node for c in clamps})
    shapes = {(c.axis.size, *[1] * (len(shape_of(c.result)) - 1 - c.axis.dim)) for c in norm.calls}
    if len(shapes) > 1:
        raise Blocked("its calls have different dimensions", "axes")
    # The shift stays in the clamp, so what is behind may pad with zeros.
    starts = [(clamp.node, call.axis) for call, clamp in zip(norm.calls, clamps, strict=True)]
    shares = into_consumers(settled, starts, shifts=False)
    like = shares[0].weight
    operands: list[Any] = [norm.scale, norm.shift, ["limit", like]]
    vectors = {key: [f"clip_{key}", *operands] for key in ("scale", *TENSORS)}
    owned = all(_is_owned(norm, call) for call in norm.calls)
    return Clipping(clamps, shapes.pop(), like, vectors, owned), shares


def _is_owned(norm: Affine, call: Call) -> bool:
    """Whether a call reads a concatenation that the module around the norm has made for it alone.

    Then no one sees that its memory is used for the result: not the model, and not a hook on a module.
    """
    made = call.source.args[0]
    if (
        not isinstance(made, fx.Node)
        or name_of(made) != "aten.cat"
        or module_path(made) != norm.path.rpartition(".")[0]
    ):
        return False
    # The mark's readers too: it is the same memory once the marks are gone.
    return set(readers(made)) == {call.source} and call.nodes.issuperset(readers(call.source))


def _check_module(graph: Graph, path: str, own: set[fx.Node]) -> None:
    """The module that is the activation must be nothing else, and nobody else's."""
    module = graph.modules.get(path)
    if module is None or sum(m is module for m in graph.modules.values()) > 1 or list(module.children()):
        raise Blocked(f"`{path}` is more than one activation", "not-a-module")
    for node in graph.nodes:
        if node.op == "call_function" and module_path(node) == path and node not in own and node.target is not MARKER:
            raise Blocked(f"`{path}` is the activation of other values, too", "not-a-module")
