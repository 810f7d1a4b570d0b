"""The proof that a model with modules taken away computes what it did, but for what they did.

The edited model is traced again, and its graph must be the old one, operation by operation, with each absorbed norm
read as the identity, each clipped one as its bounds, and with biases where they were added. So no assumption is left
about what a class does with its children, attributes or missing biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch import fx

from normconvert.analysis.affine_norms import find_affine_norms
from normconvert.analysis.op_table import name_of
from normconvert.analysis.parallel_branches import find_blocks
from normconvert.analysis.streams import operation
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.clipping import TENSORS, clamp_behind
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import MARK

SILENT = {"aten._assert_tensor_metadata"}


def difference(graph: Graph, edited: Graph, plan: Plan) -> str:
    """The first difference between the two graphs that the plan does not explain, in words; empty if there is none."""
    taken = {v.path for v in plan.converted}
    alone = {v.path for v in plan.converted if v.code != "merged"}
    clips = {e["path"]: e for e in plan.modules if e["op"] == "clip"}
    alone -= clips.keys()
    found_norms = find_affine_norms(graph)
    gone = {c.result: c.source for a in found_norms if a.path in alone for c in a.calls}
    norms = [a for a in found_norms if a.path in clips]
    clamps = {_through(c.result): (c.source, clamp_behind(graph, a, c).node, a.path) for a in norms for c in a.calls}
    inside = {n for a in found_norms if a.path in taken for c in a.calls for n in c.nodes}
    blocks = {e["path"]: e for e in plan.modules if e["op"] == "merge"}
    merged = {result: (source, blocks[b.path]) for b in find_blocks(graph) if b.path in blocks
              for source, result, _ in b.calls}  # fmt: skip
    sums = {_through(result): found for result, found in merged.items()}
    inside |= {n for b in find_blocks(graph) if b.path in blocks for _, _, nodes in b.calls for n in nodes} - set(sums)
    skip = (inside | _made_of(graph, set(plan.removed)) | {clamp for _, clamp, _ in clamps.values()}) - set(sums)
    skip -= set(clamps)
    names = {p.name: node for node, p in edited.parameters.items()}
    image: dict[fx.Node, fx.Node] = {}
    for node, parameter in graph.parameters.items():
        if parameter.name in names:
            image[node] = names[parameter.name]
    given = [n for n in edited.nodes if n.op == "placeholder" and n not in edited.parameters]
    for node in graph.nodes:
        if node.op == "placeholder" and node not in graph.parameters:
            if not given:
                return f"the edited model has no input `{node.name}`"
            image[node] = given.pop(0)
    biases = {node: p.name for node, p in edited.parameters.items() if p.name in plan.tensors}
    rest = _operations(edited, set())
    for node in _operations(graph, skip):
        other = next(rest, None)
        if other is None:
            return f"{operation(node)} does not run any more"
        if node in clamps:
            source, clamp, path = clamps[node]
            found = [other, *islice(rest, 2)]
            if not _is_clamp(found, _image(source, image, gone), path, names):
                return f"`{path}` is not the clamp that it should be"
            image[clamp] = found[-1]
            continue
        if node in sums:
            source, edit = sums[node]
            if not _is_merged(other, edit, _image(source, image, gone), names):
                return f"`{edit['path']}` is not the convolution that it should be"
            image[node] = other
            continue
        if name_of(node) != name_of(other) or not _same(node, other, image, gone, biases):
            return f"{operation(node)} has become {operation(other)}, or reads something else"
        image[node] = other
    if (more := next(rest, None)) is not None:
        return f"{operation(more)} runs in addition"
    returned: dict[Any, tuple[str, ...]] = {}
    for node, labels in edited.outputs.items():  # one value may be returned twice, with and without a mark
        returned[_through(node)] = (*returned.get(_through(node), ()), *labels)
    for node, labels in graph.outputs.items():
        if not set(labels) <= set(returned.get(_image(node, image, gone), ())):
            return f"the output {', '.join(labels)} is another value"
    return _unread_bias(edited, plan)


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
        if node.op == "call_function" and node.target is not MARK and node not in skip and name_of(node) not in SILENT:
            yield node


def _through(node: Any) -> Any:
    """What a mark marks."""
    while isinstance(node, fx.Node) and node.target is MARK:
        node = node.args[0]
    return node


def _image(value: Any, image: Mapping[fx.Node, fx.Node], gone: Mapping[fx.Node, fx.Node]) -> Any:
    """What a value of the old graph is in the new one."""
    while isinstance(value, fx.Node) and value not in image:
        if value in gone:
            value = gone[value]
        elif value.target is MARK:
            value = value.args[0]
        else:
            return None
    return image[value] if isinstance(value, fx.Node) else value


def _same(
    node: fx.Node,
    other: fx.Node,
    image: Mapping[fx.Node, fx.Node],
    gone: Mapping[fx.Node, fx.Node],
    biases: Mapping[fx.Node, str],
) -> bool:
    """Whether two operations read the same; an absent bias may have become one of ``biases``."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, fx.Node):
            return _image(a, image, gone) is _through(b)
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
