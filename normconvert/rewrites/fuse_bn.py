"""BatchNorm and its kin -> nothing: each affine norm moves into the linear maps before it, or behind it.

In eval mode BatchNorm is y = a * x + b with a = w / sqrt(v + eps), b = beta - m a.
`normconvert.analysis.affine_norms` finds such norms, `normconvert.rewrites.moving` says which linear maps can take
(a, b) instead. All calls of a norm move, or none;
nothing moves unless nobody else can see the difference. Two norms in a row are moved one after the other: behind,
W (a' (a x + b) + b') + c = (W diag(a') diag(a)) x + W (a' b) + W b' + c. A norm that can move neither way, before a
ReLU, becomes a part of it where the ReLU's readers are linear maps: `normconvert.rewrites.clipping`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import fx, nn

from normconvert.analysis.affine_norms import Affine, find_affine_norms
from normconvert.analysis.channel_axes import Place
from normconvert.analysis.operations import NEUTRAL, name_of
from normconvert.analysis.parallel_branches import Block, find_blocks
from normconvert.analysis.streams import operation
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.plan.vectors import Expression, part, times
from normconvert.rewrites.clipping import Clipping, clip
from normconvert.rewrites.linear_maps import Blocked
from normconvert.rewrites.moving import Share, Walk, agreed
from normconvert.rewrites.proof import difference
from normconvert.rewrites.registry import rewrite
from normconvert.tracing.graph import Graph, module_path

Edits = dict[str, list[dict[str, Any]]]


@rewrite("fuse-bn", proof=difference)
def plan_fuse_bn(graph: Graph, options: Options) -> Plan:
    """The plan that moves every affine norm that can move into linear maps beside it.

    Every norm gets a verdict.
    """
    shut = graph
    if options.through_features:
        graph = replace(graph, exits={})
    norms = find_affine_norms(graph)
    blocks = find_blocks(graph) if options.merge_branches else []
    merged = frozenset(n for b in blocks for _, _, nodes in b.calls for n in nodes)
    before: Edits = defaultdict(list)
    behind: Edits = defaultdict(list)
    made: dict[str, tuple[str, int]] = {}
    verdicts, modules, removed = [], [], []
    bounds: Edits = {}
    for norm, (verdict, shares, clipping) in zip(norms, _decide(graph, norms, blocks, merged), strict=True):
        verdicts.append(verdict)
        if not verdict.converted or verdict.code == "merged":
            continue
        backwards = verdict.code == "fused-before"
        scale, shift = norm.scale, norm.shift
        if clipping is not None:
            scale, shift = clipping.vectors["scale"], 0
            bounds |= clipping.tensors(norm.path)
            modules.append({"op": "clip", "path": norm.path, "shape": list(clipping.shape),
                            "keep": list(norm.keep), "activation": clipping.activation,
                            "owned": clipping.owned})  # fmt: skip
        else:
            modules.append({"op": "absorb", "path": norm.path, "keep": list(norm.keep)})
        for share in shares:
            _edit(norm.calls[0].place.size, scale, shift, share, backwards, before if backwards else behind, made)
        removed += _tensors_under(graph, norm.path, norm.keep)
    taken = [v for v in verdicts if v.code == "merged"]
    blocks = [b for b in blocks if any(v.path.startswith(f"{b.path}.") for v in taken)]
    merges: Edits = {}
    for block in blocks:
        modules.append(_merge(block, merges))
        removed += _tensors_under(graph, block.path, block.keep)
    # What a norm behind scales is read before what the norm in front has scaled: see add_product in edits.py.
    graph_names = {alias for parameter in graph.parameters.values() for alias in parameter.aliases}
    tensors: Edits = merges | bounds
    for bias, (weight, size) in made.items():
        tensors[bias] = [{"op": "new", "shape": [size], "like": weight}]
    for side in (behind, before):
        for name, rows in side.items():
            if name in graph_names or name in made:  # no bias: nothing to scale
                tensors.setdefault(name, []).extend(rows)
    biases = [
        {"op": "bias", "path": name.rpartition(".")[0], "name": "bias", "size": size}
        for name, (_, size) in made.items()
    ]
    verdicts += _never_called(graph, {norm.path for norm in norms})
    shifted = _changed_exits(shut, norms, blocks, merged, verdicts) if options.through_features else []
    return Plan("fuse-bn", tensors=tensors, modules=biases + modules, removed=removed, verdicts=verdicts,
                shifted_doors=shifted)  # fmt: skip


def _changed_exits(
    graph: Graph, norms: list[Affine], blocks: list[Block], merged: frozenset[fx.Node], verdicts: list[Verdict]
) -> list[dict[str, str]]:
    """The ways out that return other values: all, if with them shut any norm had gone elsewhere, or blocks merge."""
    again = {v.path: v.code for v, _, _ in _decide(graph, norms, blocks, merged)}
    if not blocks and all(again.get(v.path, v.code) == v.code for v in verdicts):
        return []
    names = dict.fromkeys(name for names in graph.exits.values() for name in names)
    return [{"door": name, "output": "", "why": "scaled"} for name in names]


def _is_inside(norm: Affine, merged: frozenset[fx.Node]) -> bool:
    return bool(norm.calls) and all(call.nodes <= merged for call in norm.calls)


def _merge(block: Block, edits: Edits) -> dict[str, Any]:
    """The module edit that puts one convolution in place of a block's branches; its tensors' edits go to ``edits``."""
    like = next(tap.weight for tap in block.taps if tap.weight is not None)
    shape = [block.outputs, block.inputs // block.groups, *block.kernel]
    rows: list[dict[str, Any]] = [{"op": "new", "shape": shape, "like": like}]
    for tap in block.taps:
        own = {"weight": tap.weight} if tap.weight is not None else {}
        rows.append({"op": "add_kernel", **own, "by": tap.scale, "at": block.offset(tap)})
    edits[f"{block.path}.merged.weight"] = rows
    edits[f"{block.path}.merged.bias"] = [
        {"op": "new", "shape": [block.outputs], "like": like},
        {"op": "shift", "by": block.shift, "axis": 0},
    ]
    settings = {k: list(getattr(block, k)) for k in ("kernel", "stride", "padding", "dilation", "keep")}
    return {"op": "merge", "path": block.path, "inputs": block.inputs, "outputs": block.outputs,
            "groups": block.groups, **settings}  # fmt: skip


Decision = tuple[Verdict, list[Share], Clipping | None]


def _decide(graph: Graph, norms: list[Affine], blocks: list[Block], merged: frozenset[fx.Node]) -> list[Decision]:
    """Before or behind or nowhere, with the reason, for every norm.

    Moves before go through norms that have moved before, so those are decided in execution order; moves behind go
    through norms that have moved behind, so what is left is decided from the last norm to the first.
    """
    gone: dict[fx.Node, fx.Node] = {}
    passed: dict[fx.Node, tuple[Place, Expression]] = {}
    found: dict[int, Decision] = {}
    rest: list[tuple[int, Affine, Blocked]] = []
    for at, norm in enumerate(norms):
        if home := next((b for b in blocks if norm.path.startswith(f"{b.path}.") and _is_inside(norm, merged)), None):
            reason = f"into one convolution, with the branches of `{home.path}`."
            found[at] = Verdict(norm.path, norm.kind, True, reason, "merged"), [], None
            continue
        if norm.obstacle:
            found[at] = Verdict(norm.path, norm.kind, False, f"{norm.obstacle}.", norm.code), [], None
            continue
        try:
            shares = _backwards(graph, norm, gone, merged)
        except Blocked as blocked:
            rest.append((at, norm, blocked))
        else:
            why = f"into {_named(shares)} before it."
            found[at] = Verdict(norm.path, norm.kind, True, why, "fused-before"), shares, None
            gone |= {call.result: call.source for call in norm.calls}
    for at, norm, first in reversed(rest):
        try:
            shares = _forwards(graph, norm, gone, merged, passed)
        except Blocked as second:
            try:
                clipping, shares = clip(graph, norm, gone, merged, passed)
            except Blocked as third:
                behind = third if third.code == "features" else second
                # An unknown operation says least, so the other side's reason is the class where there is one.
                code = first.code if first.code != "unknown-op" and behind.code != "features" else behind.code
                why = f"before it, {first}; behind it, {behind}."
                found[at] = Verdict(norm.path, norm.kind, False, why, code), [], None
            else:
                why = f"into {operation(clipping.clamps[0].node)} and {_named(shares)} behind it."
                found[at] = Verdict(norm.path, norm.kind, True, why, "clipped"), shares, clipping
        else:
            why = f"into {_named(shares)} behind it."
            found[at] = Verdict(norm.path, norm.kind, True, why, "fused-behind"), shares, None
            gone |= {call.result: call.source for call in norm.calls}
            passed |= {call.source: (call.place, norm.scale) for call in norm.calls}
    return [found[at] for at in range(len(norms))]


def _named(shares: list[Share]) -> str:
    names = list(dict.fromkeys(f"`{share.weight.rpartition('.')[0]}`" for share in shares))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _backwards(graph: Graph, norm: Affine, gone: dict[fx.Node, fx.Node], merged: frozenset[fx.Node]) -> list[Share]:
    """The linear maps that make what every call reads, if nobody else sees it."""
    walks = []
    for call in norm.calls:
        walk = Walk(graph, gone, merged)
        walk.back(call.source, call.place, (0, call.place.size), True)
        walks.append(walk)
    changed = {node for walk in walks for node in walk.changed} | {n for call in norm.calls for n in call.nodes}
    # Between the input of a norm that has moved and its result nothing happens any more: they are one value.
    inside = changed | {source for result, source in gone.items() if result in changed}
    for walk in walks:
        for node in walk.changed:
            for user in node.users:
                # The value changes for all its readers, so each has to be on the way.
                if user not in inside and not _only_asks(user, node) and not _is_gone(user, inside, gone):
                    if user in graph.exits:
                        walk.stop_at_exit(user)
                    if user.op == "output":
                        raise Blocked("the model returns what it reads", "returned")
                    raise Blocked(f"{operation(user)} reads the same value", "read-elsewhere")
    return agreed(walks)


def _is_gone(user: fx.Node, inside: set[fx.Node], gone: dict[fx.Node, fx.Node]) -> bool:
    """Whether a reader is part of a norm that has moved: what it computes is not used any more."""
    return any(result in inside and _between(user, source, result) for result, source in gone.items())


def _between(node: fx.Node, source: fx.Node, result: fx.Node) -> bool:
    work, seen = [result], set()
    while work:
        at = work.pop()
        if at is node:
            return True
        if at in seen or at is source:
            continue
        seen.add(at)
        work += at.all_input_nodes
    return False


def _only_asks(user: fx.Node, node: fx.Node) -> bool:
    """Whether a reader asks for the shape or dtype alone."""
    like = name_of(user) in ("aten.type_as", "aten.expand_as", "aten.view_as", "aten.reshape_as")
    return name_of(user) in NEUTRAL or (like and user.args[0] is not node)


def _forwards(
    graph: Graph, norm: Affine, gone: dict[fx.Node, fx.Node], merged: frozenset[fx.Node],
    passed: dict[fx.Node, tuple[Place, Expression]],
) -> list[Share]:  # fmt: skip
    """The linear maps that read what every call makes."""
    if norm.keep:  # see clipping
        raise Blocked(f"`{norm.path}.{norm.keep[0]}` reads it", "unknown-op")
    walks = []
    for call in norm.calls:
        walk = Walk(graph, gone, merged, passed)
        walk.ahead(call.result, call.place, 0, call.place.size)
        if not walk.shares:
            raise Blocked("nothing reads it", "unused")
        walks.append(walk)
    return agreed(walks)


def _edit(
    size: int, scale: Expression, shift: Expression, share: Share, backwards: bool, edits: Edits,
    made: dict[str, tuple[str, int]],
) -> None:  # fmt: skip
    """Add the edits of one linear map."""
    scale, shift = (part(v, *share.channels, size) for v in (scale, shift))
    row: dict[str, Any] = {"axis": share.axis}
    row |= {"outer": share.outer} if share.outer != 1 else {}
    row |= {"inner": share.inner} if share.inner != 1 else {}
    row |= {"groups": share.groups} if share.groups != 1 else {}
    row |= {"start": share.start} if share.start else {}
    edits[share.weight].append({"op": "scale", "by": scale, **row})
    bias = share.bias or f"{share.weight.rpartition('.')[0]}.bias"
    if share.bias is None and share.shifted:
        made.setdefault(bias, (share.weight, share.outputs))
    if not backwards:
        if not share.shifted:
            return
        # The weight is that of the source: what a norm on the way has scaled in it is in the share's factor.
        edits[bias].append({"op": "add_product", "weight": share.weight, "by": times(share.factor, shift), **row})
        return
    along = {k: v for k, v in row.items() if k in ("outer", "inner")} | {"axis": 0}
    # a (W u + c) + b: scaled first, then shifted.
    edits[bias].append({"op": "scale", "by": scale, **along})
    if share.shifted:
        edits[bias].append({"op": "shift", "by": shift, **along})


def _tensors_under(graph: Graph, path: str, keep: tuple[str, ...]) -> list[str]:
    """All tensors that a module holds, under all its names, but for those of the children that stay."""
    module = graph.modules[path]
    paths = [name for name, other in graph.modules.items() if other is module]
    names = [n for n in module.state_dict(keep_vars=True) if n.partition(".")[0] not in keep]
    return [f"{own}.{name}" for own in paths for name in names]


def _never_called(graph: Graph, called: set[str]) -> list[Verdict]:
    """Verdicts for the BatchNorms, and other modules with a running variance, that were not found in any call."""
    seen = {id(graph.modules[path]) for path in called if path in graph.modules}
    run = {module_path(node) for node in graph.nodes}
    found: dict[int, Verdict] = {}
    for path, module in graph.modules.items():
        known = isinstance(module, nn.modules.batchnorm._BatchNorm) or "running_var" in module._buffers
        part = any(path == p or path.startswith(f"{p}.") for p in called)
        if not known or part or id(module) in seen | set(found):
            continue
        reason, code = "no traced input makes the model run it.", "unreached"
        if path in run:
            reason, code = "what it computes is not seen to be an affine map of its input, channel by channel.", "form"
        found[id(module)] = Verdict(path, type(module).__name__, False, reason, code)
    return list(found.values())
