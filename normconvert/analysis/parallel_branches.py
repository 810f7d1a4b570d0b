"""Finding parallel branches that are one convolution: sum_i a_i * (W_i x + c_i) + e * x + b.

Re-parameterisable blocks (RepVGG, MobileOne, RepViT, FastViT) train several convolutions and a skip side by side, each
with a norm, and add them up. All are linear in the block's input, with taps at fixed places, so their sum is one
convolution (arXiv 2101.03697, section 3.3). No block is known by name: a module is such a block if what it returns is a
sum of taps of its input, followed by nothing but children (its activation, its attention).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from normconvert.analysis.affine_forms import SAME, Form, Vectors, is_data_batch_norm, normalise
from normconvert.analysis.affine_norms import children_after, uses_outside
from normconvert.analysis.channel_axes import is_float, shape_of
from normconvert.analysis.operations import NEUTRAL, name_of
from normconvert.plan.vectors import Expression, minus, plus, times
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARKER

CONVOLUTIONS = {"aten.conv1d": 1, "aten.conv2d": 2, "aten.conv3d": 3}
LARGEST = 256
"""Operations in the largest module that is looked at, boundary markers included."""


@dataclass(frozen=True)
class Tap:
    """One convolution of the input, or (without a weight) the input itself, scaled by ``scale`` per output channel."""

    weight: str | None
    scale: Expression
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 0
    outputs: int = 0


@dataclass(frozen=True)
class Sum:
    """A sum of taps and a shift per channel, made by ``nodes``."""

    taps: tuple[Tap, ...]
    shift: Expression
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class Block:
    """A module whose branches are one convolution.

    Attributes:
        path: its path.
        calls: (input, the sum, operations in between) of each call.
        taps: what is added up.
        shift: added to the sum.
        keep: children that run afterwards.
        inputs: channels in; ``outputs`` channels out.
        kernel: of the one convolution, as ``stride``, ``padding``, ``dilation`` and ``groups``.
    """

    path: str
    calls: tuple[tuple[fx.Node, fx.Node, frozenset[fx.Node]], ...]
    taps: tuple[Tap, ...]
    shift: Expression
    keep: tuple[str, ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def offset(self, tap: Tap) -> list[int]:
        """Where a tap's kernel begins in the one kernel, in each dimension."""
        return [p - q for p, q in zip(self.padding, tap.padding or (0,) * len(self.padding), strict=True)]


def find_blocks(graph: Graph) -> list[Block]:
    """All outermost modules whose branches can be merged, in execution order."""
    inside: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        path = str(node.args[1]) if node.target is MARKER else module_path(node)
        while node.op == "call_function" and path:
            inside[path].append(node)
            path = path.rpartition(".")[0]
    vectors = Vectors(graph)
    calls: dict[str, list[tuple[fx.Node, fx.Node, Sum, tuple[str, ...]] | None]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is MARKER and node.args[2:4] == ("input", "0") and len(inside[str(node.args[1])]) <= LARGEST:
            path = str(node.args[1])
            calls[path].append(_call(graph, path, node, inside[path], vectors))
    found: dict[str, Block] = {}
    for path, group in calls.items():
        block = _block(graph, path, group)
        if block is not None:
            found[path] = block
    return [b for path, b in found.items() if not any(path.startswith(f"{other}.") for other in found)]


def _call(
    graph: Graph, path: str, source: fx.Node, nodes: Iterable[fx.Node], vectors: Vectors
) -> tuple[fx.Node, fx.Node, Sum, tuple[str, ...]] | None:
    sums = {source: Sum((Tap(None, 1),), 0, frozenset())}
    for node in nodes:
        if any(n in sums for n in node.all_input_nodes) and (made := _step(graph, node, sums, vectors)) is not None:
            sums[node] = made
    leaving = [
        n for n, s in sums.items() if s.nodes and any(u not in sums and name_of(u) not in NEUTRAL for u in n.users)
    ]
    ends = [n for n in sums if n.target is MARKER and n.args[1:4] == (path, "output", "")]
    # The sum may be seen at one place only: at the module's output, or by the children that run last.
    last = [*dict.fromkeys([*leaving, *ends])]
    inner = [n for n in leaving if not any(e in _markers_of(n) for e in ends)]
    if len(inner or ends) != 1 and len(last) != 1:
        return None
    result = (ends or inner)[0]
    if ends and inner and inner != ends:
        return None
    keep = () if ends else children_after(result, path)
    if keep is None:
        return None
    made = sums[result]
    own = [n for n in made.nodes if n.target is not MARKER]
    working = {module_path(n).removeprefix(f"{path}.").partition(".")[0] for n in own if module_path(n) != path}
    # A module that adds nothing up itself is a container of the block. A child cannot be merged and run afterwards.
    if not any(module_path(n) == path for n in own) or working & set(keep):
        return None
    if any(n in graph.exits for n in made.nodes - {result}):
        return None
    # A branch that somebody reads by itself is still needed.
    halfway = (u for n in made.nodes - {result} for u in n.users if u not in made.nodes and name_of(u) not in NEUTRAL)
    return None if any(halfway) else (source, result, made, keep)


def _markers_of(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u.target is MARKER]


def _step(graph: Graph, node: fx.Node, sums: dict[fx.Node, Sum], vectors: Vectors) -> Sum | None:
    name = name_of(node)
    first: Any = node.args[0] if node.args else None
    known = sums.get(first) if isinstance(first, fx.Node) else None
    if known is not None and name in SAME and is_float(node):
        return replace(known, nodes=known.nodes | {node})
    if known is not None and "getitem" in name and node.args[1] == 0 and "batch_norm" in name_of(first):
        return replace(known, nodes=known.nodes | {node})
    if known is not None and is_data_batch_norm(node):
        form = normalise(node, Form(1, 0, None, 1, frozenset()), vectors)
        return None if form is None else _scaled(known, form.scale, form.shift, node)
    # Of the input itself only: taps of taps are another kernel, and a shift would not reach into the zero padding.
    if known is not None and name in CONVOLUTIONS and known.shift == 0 and known.taps == (Tap(None, 1),):
        return _convolved(graph, node, known)
    if name not in ("aten.add", "aten.sub", "aten.mul") or node.kwargs.get("alpha", 1) != 1:
        return None
    other: Any = node.args[1]
    more = sums.get(other) if isinstance(other, fx.Node) else None
    if known is not None and more is not None:
        if name == "aten.mul" or shape_of(first) != shape_of(other):
            return None
        negate = name == "aten.sub"
        taps = tuple(replace(t, scale=["neg", t.scale] if negate else t.scale) for t in more.taps)
        join = minus if negate else plus
        return Sum(known.taps + taps, join(known.shift, more.shift), known.nodes | more.nodes | {node})
    form_of, value = (known, other) if known is not None else (more, first)
    if form_of is None or (known is None and name == "aten.sub"):
        return None
    # Along dimension 1 or all alike: these are the sums whose channels are a convolution's.
    along = vectors.along(value, node)
    if along is None or along[1] not in (None, 1):
        return None
    if name == "aten.mul":
        return _scaled(form_of, along[0], 0, node)
    join = plus if name == "aten.add" else minus
    return Sum(form_of.taps, join(form_of.shift, along[0]), form_of.nodes | {node})


def _scaled(known: Sum, scale: Expression, shift: Expression, node: fx.Node) -> Sum:
    taps = tuple(replace(t, scale=times(t.scale, scale)) for t in known.taps)
    return Sum(taps, plus(times(known.shift, scale), shift), known.nodes | {node})


def _convolved(graph: Graph, node: fx.Node, known: Sum) -> Sum | None:
    count = CONVOLUTIONS[name_of(node)]
    args: list[Any] = [*node.args, *[None] * 7][:7]
    weight, bias, stride, padding, dilation, groups = args[1:]
    # "same" pads one side more where the kernel is even, and without a batch the channels are dimension 0.
    if node.kwargs or isinstance(padding, str) or len(shape_of(node)) != count + 2:
        return None
    names = []
    for operand in (weight, bias):
        parameter = graph.parameters.get(operand) if isinstance(operand, fx.Node) else None
        # A computed weight has no name to read it by, and a tied one is needed elsewhere as it is.
        if operand is not None and (parameter is None or not parameter.stored or len(parameter.aliases) > 1):
            return None
        names.append(parameter.name if parameter is not None else None)
    shape = shape_of(weight)

    def each(value: Any, default: int) -> tuple[int, ...]:
        values = [default] if value is None else value if isinstance(value, (list, tuple)) else [value]
        return tuple(int(v) for v in (list(values) * count)[:count])

    tap = Tap(
        names[0], 1, tuple(int(n) for n in shape[2:]), each(stride, 1), each(padding, 0), each(dilation, 1),
        int(groups or 1), int(shape[0]),
    )  # fmt: skip
    return Sum((tap,), names[1] or 0, known.nodes | {node})


def _block(graph: Graph, path: str, group: list[Any]) -> Block | None:
    """One convolution for all calls, if the taps fit each other."""
    if any(call is None for call in group):
        return None
    source, _, made, keep = group[0]
    convolutions = [t for t in made.taps if t.weight is not None]
    if len(made.taps) < 2 or not convolutions or any((c[2].taps, c[2].shift, c[3]) != (made.taps, made.shift, keep)
                                                     for c in group):  # fmt: skip
        return None
    first = convolutions[0]
    inputs, rank = int(shape_of(source)[1]), len(first.kernel)
    skips = len(convolutions) < len(made.taps)
    if any((t.stride, t.groups, t.outputs) != (first.stride, first.groups, first.outputs) for t in convolutions):
        return None
    # The input itself is a tap only if each of its places has a result, and each channel one of its own.
    if skips and (set(first.stride) != {1} or first.outputs != inputs):
        return None
    # A kernel of one has nothing to spread, so its dilation does not matter.
    dilations = {t.dilation for t in convolutions if set(t.kernel) != {1}}
    if len(dilations) > 1:
        return None
    dilation = next(iter(dilations), (1,) * rank)
    if set(dilation) != {1}:
        return None  # taps of a dilated kernel may lie between each other's
    # All results have one size only if 2 * padding - kernel is the same for all, and then the kernels are concentric.
    borders = {tuple(2 * p - k for p, k in zip(t.padding, t.kernel, strict=True)) for t in convolutions}
    # A skip is a kernel of one without padding.
    borders |= {(-1,) * rank} if skips else set()
    if len(borders) != 1:
        return None
    # Borders agree, so the most padded kernel is the largest and holds all the others.
    padding = tuple(max(t.padding[d] for t in convolutions) for d in range(rank))
    kernel = tuple(2 * p - b for p, b in zip(padding, next(iter(borders)), strict=True))
    if uses_outside(graph, path):
        return None
    calls = tuple((c[0], c[1], c[2].nodes) for c in group)
    return Block(path, calls, made.taps, made.shift, keep, inputs, first.outputs, kernel, first.stride, padding,
                 dilation, first.groups)  # fmt: skip
