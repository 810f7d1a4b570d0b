"""Boundary markers, and what in-place writes do to them.

A marker is an identity operation at a module's input or output. It copies, so a tensor that is written to in place
after its marker has two versions in the graph where the model has one. Such markers are found here, and a second trace
does without them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from normconvert.compat.torch import OpOverload, pytree, schema
from normconvert.tracing.tensor_memory import memory_of

# Not by `torch.library.custom_op`: nothing derives through a marker, and the wrappers for that take longer than itself.
_LIBRARY = torch.library.Library("normconvert", "DEF")
_LIBRARY.define("boundary(Tensor x, str path, str side, str key) -> Tensor")
# torch does not let an operation return its input.
_LIBRARY.impl("boundary", lambda x, path, side, key: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("boundary", lambda x, path, side, key: torch.empty_like(x), "Meta")

MARKER = torch.ops.normconvert.boundary.default
# What a layer gives that no output is made of, hidden states return: it is not to be cleared away as dead.
fx.node.has_side_effect(MARKER)


def boundary_marker(x: Tensor, path: str, side: str, key: str) -> Tensor:
    """Identity on ``x``, recorded in the graph: this is input or output ``key`` of the module at ``path``."""
    marked: Tensor = MARKER(x, path, side, key)
    return marked


Boundary = tuple[str, str, str]
"""Module path, ``input`` or ``output``, and which one of them."""


def boundary_of(node: fx.Node) -> Boundary | None:
    """The place that a marker is of; None for any other operation."""
    return tuple(map(str, node.args[1:4])) if node.target is MARKER else None  # type: ignore[return-value]


def unmarked(node: Any) -> Any:
    """What a marker marks; anything else as it is."""
    while isinstance(node, fx.Node) and node.target is MARKER:
        node = node.args[0]
    return node


def without_detaching(graph: fx.Graph) -> None:
    """Take ``detach_`` for no write: it changes what autograd knows, not the memory; constants have it behind them."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.detach_.default:
            node.target = torch.ops.aten.detach.default


def mutates(node: fx.Node) -> bool:
    """Whether an operation writes to one of its operands."""
    declared = schema(node.target)
    return bool(declared is not None and declared.is_mutable)


_MAY_RETURN_ITS_INPUT = (
    *("to", "type_as", "contiguous", "reshape", "flatten", "expand", "float", "view"),
    *("meshgrid", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d"),
    # In eval mode they do, and some releases trace them as copies all the same.
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
)
"""Operations that return their input itself, or a view of it, at some dtypes and strides, and may not at the traced."""


def markers_that_lie(graph: fx.Graph) -> set[str]:
    """Module paths of the markers that hide a write.

    Nodes that are names of one memory form a class; a marker joins two classes that are one in the model. A write to
    one of them hides something if another, joined to it by markers before the write, is still used after it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    root, members = _classes(graph)
    last_use = {r: max((order[u] for n in nodes for u in n.users), default=-1) for r, nodes in members.items()}
    markers = [n for n in graph.nodes if n.target is MARKER]
    found: set[str] = set()
    for write in (n for n in graph.nodes if mutates(n)):
        earlier = [m for m in markers if order[m] < order[write]]
        joined: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for m in earlier:
            source = m.args[0]
            assert isinstance(source, fx.Node)
            # Both ways: the write may go through the name before the marker or the one behind it.
            joined[root[source]].append(root[m])
            joined[root[m]].append(root[source])
        reached, work = {root[write]}, [root[write]]
        while work:
            for other in joined[work.pop()]:
                if other not in reached:
                    reached.add(other)
                    work.append(other)
        # Who reads the written class itself later is right to see what was written; the others should see it, and do
        # not.
        if any(last_use[r] > order[write] for r in reached - {root[write]}):
            found |= {str(m.args[1]) for m in earlier if root[m] in reached}
    return found


def make_functional(graph: fx.Graph) -> bool:
    """Replace writes by the operations that return what they write, in place; whether no write remains.

    ``y = relu_(x)`` becomes ``y = relu(x)``, and what read x afterwards reads y. This is so if the memory is the
    graph's own, and has no other name that is read after the write. ``run_decompositions`` does it for all writes, and
    takes as long as the trace.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    root, members = _classes(graph)
    writes = [node for node in graph.nodes if mutates(node)]
    remaining = False
    # In execution order, so that a second write to the same memory finds the first one's result in place of x.
    for write in writes:
        target, x = _returning(write), write.args[0] if write.args else None
        names = members[root[write]]
        if (
            target is None
            or not isinstance(x, fx.Node)
            # Inputs, parameters and buffers are seen from outside.
            or any(node.op != "call_function" for node in names)
            # Another name would go on showing what was there before.
            or any(order[n] < order[write] < order[u] for n in names if n is not x for u in n.users)
            or any(u.op == "output" for u in x.users)
            # What is read under another name may be written already when it is read.
            or any(node in names for node in write.all_input_nodes if node is not x)
        ):
            remaining = True
            continue
        write.target = target
        after = order[write]
        for user in [u for u in x.users if order[u] > after]:
            user.replace_input_with(x, write)
    return not remaining


def _returning(write: fx.Node) -> OpOverload | None:
    """The operation that returns what ``write`` writes to its first operand; None if it is not known to be the same."""
    target: Any = write.target
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    arguments = schema(target).arguments
    first = arguments[0].alias_info
    if not packet.endswith("_") or first is None or not first.is_write or any(a.alias_info for a in arguments[1:]):
        return None
    same: Any = getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
    declared = schema(same)
    if declared is None or [a.name for a in declared.arguments] != [a.name for a in arguments]:
        return None
    if declared.is_mutable or len(declared.returns) != 1 or declared.returns[0].alias_info is not None:
        return None
    values = [node.meta.get("val") for node in write.all_input_nodes]
    mine = write.meta.get("val")
    # A write keeps the dtype and the shape of what it writes to; an operation that returns promotes and broadcasts.
    if not isinstance(mine, Tensor) or any(not isinstance(v, Tensor) or v.dtype != mine.dtype for v in values):
        return None
    found: OpOverload = same
    return found


def _classes(graph: fx.Graph) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, list[fx.Node]]]:
    """Each node's class, and the members of each: nodes that may be names of one memory, markers left out.

    They are if the traced values shared their storage, as those of dropout in eval mode do, whatever its schema says;
    and, for other dtypes and strides than the traced, if the operation may return what it was given.
    """
    parent: dict[fx.Node, fx.Node] = {}
    holder: dict[int, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while node in parent:
            node = parent[node]
        return node

    for node in graph.nodes:
        sources = _named_again(node) if node.op == "call_function" and node.target is not MARKER else []
        memories = [memory_of(value) for value in _strided(node)]
        if not all(memories):  # what ``vmap`` maps over hides its memory: it may be that of anything it is made of
            sources = [*sources, *node.all_input_nodes]
        for source in [*sources, *(holder.setdefault(memory, node) for memory in memories if memory)]:
            if find(source) is not find(node):
                parent[find(source)] = find(node)
    root = {node: find(node) for node in graph.nodes}
    members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, r in root.items():
        members[r].append(node)
    return root, members


def _strided(node: fx.Node) -> Iterator[Tensor]:
    """A node's traced values that have memory, as sparse ones have not; all of a graph are alive, each at its own."""
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            yield value


def _named_again(node: fx.Node) -> list[fx.Node]:
    """The operands that a result may be another name of: those of which the schema says so, or all if it is silent.

    ``x.add_(y)`` is x and not y.
    """
    declared = schema(node.target)
    if declared is None or str(node.target).split(".")[1] in _MAY_RETURN_ITS_INPUT:
        return node.all_input_nodes
    if not any(r.alias_info for r in declared.returns):
        return []
    named = [a.alias_info is not None or "List" in str(a.type) for a in declared.arguments]
    # An alias, but not said of what: then of anything.
    if not any(named):
        return node.all_input_nodes
    values = [v for v, alias in zip(node.args, named, strict=False) if alias]
    values += [node.kwargs[a.name] for a, alias in zip(declared.arguments, named, strict=True)
               if alias and a.name in node.kwargs]  # fmt: skip
    return [n for v in values for n in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(n, fx.Node)]
