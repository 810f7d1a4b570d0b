"""The proof that a model with modules taken away computes what it did, but for what they did.

The edited model is traced again, and its graph must be the old one, operation by operation, with each absorbed norm
read as the identity, each clipped one as its bounds, and with biases where they were added. So no assumption is left
about what a class does with its children, attributes or missing biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import fx

from normconvert.analysis.affine_norms import find_affine_norms
from normconvert.analysis.operations import name_of
from normconvert.analysis.parallel_branches import find_blocks
from normconvert.analysis.streams import operation
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.clipping import TENSORS, clamp_behind
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import MARKER

SILENT = {"aten._assert_tensor_metadata"}


@dataclass(frozen=True)
class _Clamp:
    """A clamp is to stand where a norm was."""

    path: str
    source: fx.Node
    activation: fx.Node


@dataclass(frozen=True)
class _Merged:
    """One convolution is to stand where a block of branches was."""

    source: fx.Node
    edit: dict[str, Any]


@dataclass(frozen=True)
class _Labels:
    """What the plan says becomes of each node of the old graph; a node with no label stays as it is.

    Attributes:
        gone: the result of an absorbed norm -> what it reads.
        becomes: last node of a norm or a block -> what stands there instead.
        skipped: nodes that do not run any more.
    """

    gone: dict[fx.Node, fx.Node]
    becomes: dict[fx.Node, _Clamp | _Merged]
    skipped: set[fx.Node]


@dataclass
class _Walk:
    """Both graphs side by side, operation by operation.

    Attributes:
        labels: of the old graph's nodes.
        rest: the new graph's operations that have not been reached yet.
        image: node of the old graph -> the same value in the new one.
        names: tensors of the new graph by name.
        biases: those that the plan edits or adds.
    """

    labels: _Labels
    rest: Iterator[fx.Node]
    image: dict[fx.Node, fx.Node]
    names: dict[str, fx.Node]
    biases: dict[fx.Node, str]

    def image_of(self, value: Any) -> Any:
        """What a value of the old graph is in the new one."""
        return _image(value, self.image, self.labels.gone)


def difference(graph: Graph, edited: Graph, plan: Plan) -> str:
    """The first difference between the two graphs that the plan does not explain, in words; empty if there is none."""
    labels = _labels(graph, plan)
    names = {p.name: node for node, p in edited.parameters.items()}
    biases = {node: p.name for node, p in edited.parameters.items() if p.name in plan.tensors}
    walk = _Walk(labels, _operations(edited, set()), _same_tensors(graph, names), names, biases)
    return (
        _match_inputs(graph, edited, walk)
        or _match_operations(graph, walk)
        or _match_outputs(graph, edited, walk)
        or _unread_bias(edited, plan)
    )


def _labels(graph: Graph, plan: Plan) -> _Labels:
    """Say of each node once what becomes of it."""
    taken = {v.path for v in plan.converted}
    clips = {e["path"] for e in plan.modules if e["op"] == "clip"}
    alone = {v.path for v in plan.converted if v.code != "merged"} - clips
    edits = {e["path"]: e for e in plan.modules if e["op"] == "merge"}
    norms = find_affine_norms(graph)
    clamps = {
        _through(call.result): _Clamp(norm.path, call.source, clamp_behind(graph, norm, call).node)
        for norm in norms if norm.path in clips for call in norm.calls
    }  # fmt: skip
    calls = [(block.path, call) for block in find_blocks(graph) if block.path in edits for call in block.calls]
    merged = {_through(result): _Merged(source, edits[path]) for path, (source, result, _) in calls}
    inside = {n for norm in norms if norm.path in taken for call in norm.calls for n in call.nodes}
    inside |= {n for _, (_, _, nodes) in calls for n in nodes}
    skipped = inside | _made_of(graph, set(plan.removed)) | {clamp.activation for clamp in clamps.values()}
    gone = {call.result: call.source for norm in norms if norm.path in alone for call in norm.calls}
    return _Labels(gone, {**merged, **clamps}, skipped - merged.keys() - clamps.keys())


def _same_tensors(graph: Graph, names: Mapping[str, fx.Node]) -> dict[fx.Node, fx.Node]:
    """The tensors that both graphs have."""
    return {node: names[p.name] for node, p in graph.parameters.items() if p.name in names}


def _match_inputs(graph: Graph, edited: Graph, walk: _Walk) -> str:
    given = [n for n in edited.nodes if n.op == "placeholder" and n not in edited.parameters]
    for node in graph.nodes:
        if node.op == "placeholder" and node not in graph.parameters:
            if not given:
                return f"the edited model has no input `{node.name}`"
            walk.image[node] = given.pop(0)
    return ""


def _match_operations(graph: Graph, walk: _Walk) -> str:
    for node in _operations(graph, walk.labels.skipped):
        other = next(walk.rest, None)
        if other is None:
            return f"{operation(node)} does not run any more"
        match walk.labels.becomes.get(node):
            case _Clamp() as clamp:
                found = _match_clamp(clamp, other, walk)
            case _Merged() as merged:
                found = _match_merged(merged, node, other, walk)
            case None:
                found = _match_same(node, other, walk)
        if found:
            return found
    if (more := next(walk.rest, None)) is not None:
        return f"{operation(more)} runs in addition"
    return ""


def _match_clamp(clamp: _Clamp, other: fx.Node, walk: _Walk) -> str:
    found = [other, *islice(walk.rest, 2)]
    if not _is_clamp(found, walk.image_of(clamp.source), clamp.path, walk.names):
        return f"`{clamp.path}` is not the clamp that it should be"
    walk.image[clamp.activation] = found[-1]
    return ""


def _match_merged(merged: _Merged, node: fx.Node, other: fx.Node, walk: _Walk) -> str:
    if not _is_merged(other, merged.edit, walk.image_of(merged.source), walk.names):
        return f"`{merged.edit['path']}` is not the convolution that it should be"
    walk.image[node] = other
    return ""


def _match_same(node: fx.Node, other: fx.Node, walk: _Walk) -> str:
    if name_of(node) != name_of(other) or not _same(node, other, walk):
        return f"{operation(node)} has become {operation(other)}, or reads something else"
    walk.image[node] = other
    return ""


def _match_outputs(graph: Graph, edited: Graph, walk: _Walk) -> str:
    returned: dict[Any, tuple[str, ...]] = {}
    for node, labels in edited.outputs.items():  # one value may be returned twice, with and without a marker
        returned[_through(node)] = (*returned.get(_through(node), ()), *labels)
    for node, labels in graph.outputs.items():
        if not set(labels) <= set(returned.get(walk.image_of(node), ())):
            return f"the output {', '.join(labels)} is another value"
    return ""


def _is_merged(node: fx.Node, edit: dict[str, Any], source: Any, names: Mapping[str, fx.Node]) -> bool:
    """Whether a node is the one convolution of a block, on its input, with its settings."""
    args: list[Any] = [*node.args, *[None] * 7][:7]
    wanted = [edit[key] for key in ("stride", "padding", "dilation")]
    default = [[1], [0], [1]]
    found = [list(a) if a is not None else d * len(edit["kernel"]) for a, d in zip(args[3:6], default, strict=True)]
    tensors = [names.get(f"{edit['path']}.merged.{leaf}") for leaf in ("weight", "bias")]
    return (
        name_of(node) == f"aten.conv{len(edit['kernel'])}d"
        and _through(args[0]) is source
        and args[1] is tensors[0]
        and args[2] is tensors[1]
        and found == wanted
        and (args[6] or 1) == edit["groups"]
    )


def _is_clamp(nodes: list[fx.Node], source: Any, path: str, names: Mapping[str, fx.Node]) -> bool:
    """Whether nodes are what the runtime's clamp makes of ``source``, with the tensors of the norm at ``path``."""
    if [name_of(n) for n in nodes] != ["aten.sub", "aten.maximum", "aten.minimum"] or any(n.kwargs for n in nodes):
        return False
    read = [source, nodes[0], nodes[1]]
    return all(
        len(node.args) == 2 and _through(node.args[0]) is value and node.args[1] is names.get(f"{path}.{tensor}")
        for node, value, tensor in zip(nodes, read, TENSORS, strict=True)
    )


def _made_of(graph: Graph, removed: set[str]) -> set[fx.Node]:
    """Values made of removed tensors alone."""
    found = {n for n, p in graph.parameters.items() if removed & set(p.aliases)}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(n in found for n in inputs):
            found.add(node)
    return found


def _operations(graph: Graph, skip: set[fx.Node]) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and node.target is not MARKER
            and node not in skip
            and name_of(node) not in SILENT
        ):
            yield node


def _through(node: Any) -> Any:
    """What a marker marks."""
    while isinstance(node, fx.Node) and node.target is MARKER:
        node = node.args[0]
    return node


def _image(value: Any, image: Mapping[fx.Node, fx.Node], gone: Mapping[fx.Node, fx.Node]) -> Any:
    """What a value of the old graph is in the new one."""
    while isinstance(value, fx.Node) and value not in image:
        if value in gone:
            value = gone[value]
        elif value.target is MARKER:
            value = value.args[0]
        else:
            return None
    return image[value] if isinstance(value, fx.Node) else value


def _same(node: fx.Node, other: fx.Node, walk: _Walk) -> bool:
    """Whether two operations read the same; an absent bias may have become one of the plan's."""
    biases = walk.biases

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, fx.Node):
            return walk.image_of(a) is _through(b)
        if a is None and isinstance(b, fx.Node):
            return b in biases
        # 1 equals True in Python, and is another argument.
        return type(a) is type(b) and a == b

    ours, theirs = list(node.args), list(other.args)
    # An absent bias is no argument at all, or None.
    if len(ours) == 2 and len(theirs) == 3 and theirs[2] in biases:
        ours.append(None)
    keys = set(node.kwargs) | set(other.kwargs)
    return same(ours, theirs) and all(same(node.kwargs.get(k), other.kwargs.get(k)) for k in keys)


def _unread_bias(edited: Graph, plan: Plan) -> str:
    """A bias that was added must be read by all that read the weight beside it."""
    nodes = {alias: node for node, p in edited.parameters.items() for alias in p.aliases}
    for edit in plan.modules:
        if edit["op"] != "bias":
            continue
        bias, weight = nodes.get(f"{edit['path']}.{edit['name']}"), nodes.get(f"{edit['path']}.weight")
        readers = [n for n in edited.nodes if weight is not None and weight in n.all_input_nodes]
        if bias is None or not readers or any(bias not in n.all_input_nodes for n in readers):
            return f"`{edit['path']}` does not apply a bias that it is given"
    return ""
