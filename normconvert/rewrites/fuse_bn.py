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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from normconvert.analysis.affine_norms import Affine, find_affine_norms
from normconvert.analysis.parallel_branches import Block, find_blocks
from normconvert.analysis.streams import operation
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.plan.vectors import part, times
from normconvert.rewrites.clipping import Clipping, clip
from normconvert.rewrites.linear_maps import Blocked, Share
from normconvert.rewrites.moving import Settled, into_consumers, into_producers
from normconvert.rewrites.registry import rewrite
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import unmarked

Edits = dict[str, list[dict[str, Any]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Decision:
    """What becomes of a norm: the linear maps that take it and, if a clamp is left, that."""

    verdict: Verdict
    shares: Sequence[Share] = ()
    clipping: Clipping | None = None


@rewrite("fuse-bn", compared="planning")
def plan_fuse_bn(graph: Graph, options: Options) -> Plan:
    """The plan that moves every affine norm that can move into linear maps beside it.

    Every norm gets a verdict.
    """
    shut, graph = graph, replace(graph, exits={}) if options.through_features else graph
    norms = find_affine_norms(graph)
    blocks = find_blocks(graph) if options.merge_branches else []
    decisions = _decide(graph, norms, blocks)
    verdicts = [decision.verdict for decision in decisions]
    draft = _Draft(graph)
    for norm, decision in zip(norms, decisions, strict=True):
        if decision.verdict.converted and decision.verdict.code != "merged":
            draft.take_away(norm, decision)
    merged = [v.path for v in verdicts if v.code == "merged"]
    taken = [b for b in blocks if any(path.startswith(f"{b.path}.") for path in merged)]
    for block in taken:
        draft.merge(block)
    verdicts += _never_called(graph, {norm.path for norm in norms})
    shifted = []
    if options.through_features:
        again = _decide(shut, norms, blocks)
        # If with the ways out shut any norm had gone elsewhere, all of them return other values.
        if taken or any(d.verdict.code != e.verdict.code for d, e in zip(again, decisions, strict=True)):
            names = dict.fromkeys(name for names in shut.exits.values() for name in names)
            shifted = [{"door": name, "output": "", "why": "scaled"} for name in names]
    return Plan("fuse-bn", tensors=draft.tensors(), modules=draft.biases() + draft.modules, removed=draft.removed,
                verdicts=verdicts, shifted_doors=shifted)  # fmt: skip


def _decide(graph: Graph, norms: list[Affine], blocks: list[Block]) -> list[Decision]:
    """Before or behind or nowhere, with the reason, for every norm.

    Moves before go through norms that have moved before, so those are decided in execution order; moves behind go
    through norms that have moved behind, so what is left is decided from the last norm to the first.
    """
    settled = Settled(graph, frozenset(n for b in blocks for call in b.calls for n in call.nodes))
    found: dict[str, Decision] = {}
    rest: list[tuple[Affine, Blocked]] = []
    for norm in norms:
        inside = bool(norm.calls) and all(call.nodes <= settled.merged for call in norm.calls)
        home = next((b for b in blocks if inside and norm.path.startswith(f"{b.path}.")), None)
        if home is not None:
            why = f"into one convolution, with the branches of `{home.path}`."
            found[norm.path] = Decision(Verdict(norm.path, norm.kind, True, why, "merged"))
        elif norm.obstacle:
            found[norm.path] = Decision(Verdict(norm.path, norm.kind, False, f"{norm.obstacle}.", norm.code))
        elif (spread := _spread_input(norm)) is not None:
            why = f"{operation(spread)} repeats one number in memory, which what follows could not write into."
            found[norm.path] = Decision(Verdict(norm.path, norm.kind, False, why, "input"))
        elif isinstance(shares := _outcome(into_producers, norm, settled), Blocked):
            rest.append((norm, shares))
        else:
            why = f"into {_named(shares)} before it."
            found[norm.path] = Decision(Verdict(norm.path, norm.kind, True, why, "fused-before"), shares)
            settled.take_away(norm, behind=False)
    for norm, before in reversed(rest):
        found[norm.path] = _decide_behind(norm, before, settled)
    return [found[norm.path] for norm in norms]


def _spread_input(norm: Affine) -> fx.Node | None:
    """What a norm reads, if several numbers of it are one in memory: the norm's result is a tensor of its own.

    Without the norm an activation in place would fail there; a trace, which has no memory, does not show it.
    """
    for call in norm.calls:
        value = unmarked(call.source).meta.get("val")
        if isinstance(value, Tensor) and any(
            step == 0 and size != 1 for step, size in zip(value.stride(), value.shape, strict=True)
        ):
            return unmarked(call.source)
    return None


def _decide_behind(norm: Affine, before: Blocked, settled: Settled) -> Decision:
    """What becomes of a norm that cannot move before what makes its input."""
    shares = _outcome(_behind, norm, settled)
    if not isinstance(shares, Blocked):
        settled.take_away(norm, behind=True)
        why = f"into {_named(shares)} behind it."
        return Decision(Verdict(norm.path, norm.kind, True, why, "fused-behind"), shares)
    clipped = _outcome(clip, norm, settled)
    if not isinstance(clipped, Blocked):
        clipping, readers = clipped
        why = f"into {operation(clipping.clamps[0].node)} and {_named(readers)} behind it."
        return Decision(Verdict(norm.path, norm.kind, True, why, "clipped"), readers, clipping)
    behind = clipped if clipped.code == "features" else shares
    # An unknown operation says least, so the other side's reason is the class where there is one.
    code = before.code if before.code != "unknown-op" and behind.code != "features" else behind.code
    return Decision(Verdict(norm.path, norm.kind, False, f"before it, {before}; behind it, {behind}.", code))


def _outcome(move: Callable[[Affine, Settled], T], norm: Affine, settled: Settled) -> T | Blocked:
    """What a move needs, or why it cannot be made."""
    try:
        return move(norm, settled)
    except Blocked as blocked:
        return blocked


def _behind(norm: Affine, settled: Settled) -> list[Share]:
    """The linear maps that read what every call makes."""
    if norm.keep:  # see clipping
        raise Blocked(f"`{norm.path}.{norm.keep[0]}` reads it", "unknown-op")
    return into_consumers(settled, [(call.result, call.axis) for call in norm.calls])


def _named(shares: Sequence[Share]) -> str:
    names = list(dict.fromkeys(f"`{share.weight.rpartition('.')[0]}`" for share in shares))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass
class _Draft:
    """The edits of a plan while it is made.

    Attributes:
        graph: the model's.
        modules: their edits.
        removed: tensors that go.
        merges: edits of merged convolutions, by tensor.
        bounds: of clamps.
        behind: of linear maps that read norms.
        before: of linear maps that norms read.
        new_biases: bias that a linear map gains -> (its weight, size).
    """

    graph: Graph
    modules: list[dict[str, Any]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    merges: Edits = field(default_factory=dict)
    bounds: Edits = field(default_factory=dict)
    behind: Edits = field(default_factory=lambda: defaultdict(list))
    before: Edits = field(default_factory=lambda: defaultdict(list))
    new_biases: dict[str, tuple[str, int]] = field(default_factory=dict)

    def take_away(self, norm: Affine, decision: Decision) -> None:
        """Give a norm's scale and shift to its shares, and leave of it what stays."""
        scale, shift, clipping = norm.scale, norm.shift, decision.clipping
        if clipping is not None:
            scale, shift = clipping.vectors["scale"], 0
            self.bounds |= clipping.tensors(norm.path)
            self.modules.append({"op": "clip", "path": norm.path, "shape": list(clipping.shape),
                                 "keep": list(norm.keep), "activation": clipping.activation,
                                 "owned": clipping.owned})  # fmt: skip
        else:
            self.modules.append({"op": "absorb", "path": norm.path, "keep": list(norm.keep)})
        size = norm.calls[0].axis.size
        for share in decision.shares:
            scale_here, shift_here = (part(vector, *share.channels, size) for vector in (scale, shift))
            bias = share.bias or f"{share.weight.rpartition('.')[0]}.bias"
            if share.bias is None and share.shifted:
                self.new_biases.setdefault(bias, (share.weight, share.outputs))
            row: dict[str, Any] = {"axis": share.axis, **_unless(1, share, "outer", "inner", "groups")}
            row |= _unless(0, share, "start")
            edits = self.before if decision.verdict.code == "fused-before" else self.behind
            edits[share.weight].append({"op": "scale", "by": scale_here, **row})
            if edits is self.before:
                # a (W u + c) + b: scaled first, then shifted.
                along = {**_unless(1, share, "outer", "inner"), "axis": 0}
                edits[bias].append({"op": "scale", "by": scale_here, **along})
                edits[bias] += [{"op": "shift", "by": shift_here, **along}] if share.shifted else []
            elif share.shifted:
                # The weight is that of the source: what a norm on the way has scaled in it is in the share's factor.
                by = times(share.factor, shift_here)
                edits[bias].append({"op": "add_product", "weight": share.weight, "by": by, **row})
        self._remove(norm.path, norm.keep)

    def merge(self, block: Block) -> None:
        """Put one convolution in place of a block's branches."""
        like = next(tap.weight for tap in block.taps if tap.weight is not None)
        shape = [block.outputs, block.inputs // block.groups, *block.kernel]
        rows: list[dict[str, Any]] = [{"op": "new", "shape": shape, "like": like}]
        for tap in block.taps:
            own = {"weight": tap.weight} if tap.weight is not None else {}
            rows.append({"op": "add_kernel", **own, "by": tap.scale, "at": block.offset(tap)})
        self.merges[f"{block.path}.merged.weight"] = rows
        self.merges[f"{block.path}.merged.bias"] = [
            {"op": "new", "shape": [block.outputs], "like": like},
            {"op": "shift", "by": block.shift, "axis": 0},
        ]
        self.modules.append({
            "op": "merge", "path": block.path, "inputs": block.inputs, "outputs": block.outputs,
            "groups": block.groups, "kernel": list(block.kernel), "stride": list(block.stride),
            "padding": list(block.padding), "dilation": [1] * len(block.kernel), "keep": list(block.keep),
        })  # fmt: skip
        self._remove(block.path, block.keep)

    def _remove(self, path: str, keep: tuple[str, ...]) -> None:
        """Remove all tensors that a module holds, under all its names, but for those of the children that stay."""
        module = self.graph.modules[path]
        paths = [name for name, other in self.graph.modules.items() if other is module]
        names = [n for n in module.state_dict(keep_vars=True) if n.partition(".")[0] not in keep]
        self.removed += [f"{own}.{name}" for own in paths for name in names]

    def biases(self) -> list[dict[str, Any]]:
        """The edits of modules that gain a bias."""
        return [
            {"op": "bias", "path": name.rpartition(".")[0], "name": "bias", "size": size}
            for name, (_, size) in self.new_biases.items()
        ]

    def tensors(self) -> Edits:
        """The edits of tensors, in the order in which they apply."""
        found: Edits = self.merges | self.bounds
        for bias, (weight, size) in self.new_biases.items():
            found[bias] = [{"op": "new", "shape": [size], "like": weight}]
        # What a norm behind scales is read before what the norm in front has scaled: see add_product in edits.py.
        for side in (self.behind, self.before):
            for name, rows in side.items():
                if name in self.graph.tensors or name in self.new_biases:  # no bias: nothing to scale
                    found.setdefault(name, []).extend(rows)
        return found


def _unless(default: int, share: Share, *names: str) -> dict[str, int]:
    """Those of a share's numbers that are not ``default``."""
    return {name: getattr(share, name) for name in names if getattr(share, name) != default}


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _never_called(graph: Graph, called: set[str]) -> list[Verdict]:
    """Verdicts for the BatchNorms, and other modules with a running variance, that were not found in any call."""
    seen = {id(graph.modules[path]) for path in called if path in graph.modules}
    run = {module_path(node) for node in graph.nodes}
    found: dict[int, Verdict] = {}
    for path, module in graph.modules.items():
        known = isinstance(module, _BATCH_NORMS) or "running_var" in module._buffers
        part = any(path == p or path.startswith(f"{p}.") for p in called)
        if not known or part or id(module) in seen | set(found):
            continue
        reason, code = "no traced input makes the model run it.", "unreached"
        if path in run:
            reason, code = "what it computes is not seen to be an affine map of its input, channel by channel.", "form"
        found[id(module)] = Verdict(path, type(module).__name__, False, reason, code)
    return list(found.values())
