"""Finding the norms of a graph: calls of ``layer_norm``, ``rms_norm``, and the same functions written by hand.

LN(x) = w * Px / sqrt(|Px|^2 / d + eps) + b with P = I - 11'/d; RMSNorm has x in place of Px. Only the part that reads
the stream matters to the proof; the module around it matters to the replacement, which must take the module's input and
give its output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normconvert.analysis.axis_rules import broadcast
from normconvert.analysis.channel_axes import ChannelAxis, Operand, carry_back, shape_of
from normconvert.analysis.handwritten import Forms, HandWritten
from normconvert.analysis.op_table import terms_of
from normconvert.analysis.rms_by_hand import CASTS, is_number, plain, rms_norm_by_hand
from normconvert.runtime import contents
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import boundary_of
from normconvert.tracing.operations import COPIES, MOVES, argument, name_of, readers


@dataclass(frozen=True, eq=False)
class Norm:
    """One call of a norm.

    Attributes:
        path: module path of the norm.
        kind: the module's class.
        source: the value it reads; ``read`` the node that reads it; ``result`` the normalised value, before any cast.
        output: the value after the weight and bias (``result`` itself for a call of layer_norm).
        place: where ``source`` carries the channels; None if the norm is over several axes.
        module: the replacement's settings (a row for `normconvert.runtime`), or None.
        obstacle: why the module cannot be replaced, if it cannot.
        float32: the norm casts its input to float32, whatever the model's dtype.
        centred: it subtracts the mean, as LayerNorm does and RMSNorm does not.
        inside: the nodes that read ``source``, and one another, on the way to ``result``, and whom nobody else reads;
            empty if somebody does.
    """

    path: str
    kind: str
    source: fx.Node
    read: fx.Node
    result: fx.Node
    output: fx.Node
    place: ChannelAxis | None
    module: dict[str, Any] | None
    obstacle: str
    float32: bool
    centred: bool = True
    inside: frozenset[fx.Node] = frozenset()


_CALLS = {"aten.layer_norm": True, "aten.rms_norm": False}
"""The operations that are norms, and whether they subtract the mean."""


def find_norms(graph: Graph, *, uncentred: bool = False) -> list[Norm]:
    """All calls of LayerNorm in execution order, whether through ``layer_norm`` or written by hand.

    Args:
        graph: the model.
        uncentred: those of RMSNorm, too.
    """
    found = []
    by_hand = Forms(graph.nodes).norms
    for node in graph.nodes:
        called = _CALLS.get(name_of(node))
        if called or (called is False and uncentred):
            found.append(_norm(graph, _called(node)))
        elif (source := by_hand.get(node)) is not None:
            found.append(_norm(graph, _by_hand(node, source)))
        elif uncentred and (source := rms_norm_by_hand(node)) is not None:
            found.append(_norm(graph, _by_hand(node, source, centred=False)))
    return found


def by_path(norms: Iterable[Norm]) -> defaultdict[str, list[Norm]]:
    """Path of a module -> all calls of its norm, in execution order."""
    found: defaultdict[str, list[Norm]] = defaultdict(list)
    for norm in norms:
        found[norm.path].append(norm)
    return found


@dataclass(frozen=True)
class _Found:
    """A norm as it stands in the graph, before its module is looked at; the names are those of `Norm`."""

    source: fx.Node
    read: fx.Node
    result: fx.Node
    output: fx.Node
    place: ChannelAxis | None
    weight: Any
    bias: Any
    eps: float | None
    called: bool = False
    centred: bool = True
    inside: frozenset[fx.Node] = frozenset()


def _called(node: fx.Node) -> _Found:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axes = list(node.args[1])  # type: ignore[arg-type]
    shape = shape_of(source)
    place = ChannelAxis(len(shape) - 1, int(shape[-1])) if len(axes) == 1 and isinstance(shape[-1], int) else None
    if not _CALLS[name_of(node)]:
        # Without an eps it is the dtype's, which is no number of the model.
        eps = argument(node, 3, "eps")
        weight = argument(node, 2, "weight")
        return _Found(
            source, node, node, node, place, weight, None, None if eps is None else float(eps), called=True,
            centred=False, inside=frozenset({node}),
        )  # fmt: skip
    weight, bias, eps = (argument(node, i, name) for i, name in ((2, "weight"), (3, "bias"), (4, "eps")))
    return _Found(
        source, node, node, node, place, weight, bias, 1e-5 if eps is None else float(eps), called=True,
        inside=frozenset({node}),
    )  # fmt: skip


def _by_hand(node: fx.Node, source: HandWritten, *, centred: bool = True) -> _Found:
    """The affine part, if there is one, follows the normalised value inside the same module."""
    weight = bias = None
    at = node
    while len(users := list(at.users if centred else readers(at))) == 1:
        # A value with two readers ends the affine part, since a replacement returns one value.
        user = users[0]
        others = [a for a in user.all_input_nodes if a is not at]
        aligned = len(others) == 1 and _aligned(others[0], user, source.place) and plain(user)
        # Only before a bias: (n + b) * w is another function.
        if name_of(user) == "aten.mul" and aligned and weight is None and bias is None:
            weight = others[0]
        elif name_of(user) == "aten.add" and aligned and bias is None:
            bias = others[0]
        # A cast may take its dtype from a parameter, and is passed over; everything else ends the affine part.
        elif not (name_of(user) in CASTS and not [o for o in others if o.op != "placeholder"]):
            break
        at = user
    return _Found(
        source.x, source.read, node, at, source.place, weight, bias, source.eps, centred=centred, inside=source.inside
    )


def _aligned(vector: fx.Node, user: fx.Node, place: ChannelAxis) -> bool:
    """Whether an affine operand lies along the norm's channels and is the same everywhere else."""
    at = carry_back(Operand(vector, broadcast(vector, user)), place, user)
    shape = shape_of(vector)
    return isinstance(at, ChannelAxis) and all(n == 1 for d, n in enumerate(shape) if d != at.dim)


def _norm(graph: Graph, found: _Found) -> Norm:
    path = module_path(found.result)
    module = graph.modules.get(path)
    kind = type(module).__name__ if module is not None else "layer_norm" if found.centred else "rms_norm"
    entry, float32 = _boundary_in(found.source, path) if found.place is not None else (None, False)
    float32 = float32 or any(map(is_float32_cast, found.inside))
    settings = _replacement(graph, found, path, entry, float32)
    row, obstacle = (None, settings) if isinstance(settings, str) else (settings, "")
    return Norm(
        path, kind, found.source, found.read, found.result, found.output, found.place, row, obstacle,
        float32, found.centred, found.inside,
    )  # fmt: skip


def _replacement(
    graph: Graph, found: _Found, path: str, entry: list[int] | None, float32: bool
) -> dict[str, Any] | str:
    """The settings of what could stand in for the norm's module, or why nothing can.

    Args:
        graph: the model.
        found: the norm.
        path: of the module that runs it.
        entry: for each dimension of what it reads the dimension of the module's input, if it is that.
        float32: whether it casts its input.
    """
    place = found.place
    if place is None:
        return "it normalises over several axes at once"
    leave = _boundary_out(found.output, path)
    if entry is None or leave is None:
        return f"it is called inside `{path or type(graph.modules.get(path)).__name__}`, not as a module of its own"
    if any(leave[d] != source_dim for d, source_dim in enumerate(entry)):
        return f"`{path}` moves the dimensions of what it normalises"
    weight, offset = _named_parameter(graph, found.weight, path)
    bias, shift = _named_parameter(graph, found.bias, path)
    # weight + 1 is a setting of the replacement, bias + 1 is not.
    if (found.weight is not None and weight is None) or (found.bias is not None and bias is None) or shift != 0:
        return f"its weight or bias is not a parameter of `{path}`"
    if weight is not None and weight == bias:
        return f"`{path}` has one parameter for weight and bias"
    axis = entry[place.dim] - len(entry)
    # A replacement for layer_norm has the channels innermost whatever the module's input.
    at = ChannelAxis(-1 if found.called else axis, place.size)
    names = {name for name in (weight, bias) if name is not None}
    if obstacle := _not_taken_over(graph.modules[path], path, names, at, len(entry)):
        return obstacle
    row = {"op": "replace", "path": path, "kind": "rmsnorm", "size": place.size, "eps": found.eps, "axis": axis}
    row |= {"weight": weight, "bias": bias, "offset": offset, "upcast": float32}
    if found.called and axis != -1:
        row["channels_last"] = True  # in memory: layer_norm's result is contiguous before it is moved back
    return row


def _not_taken_over(module: nn.Module, path: str, names: set[str], at: ChannelAxis, rank: int) -> str:
    """Why a replacement that has parameters alone cannot stand in for a norm's module; empty if it can.

    Args:
        module: the norm's.
        path: its path.
        names: its weight and bias.
        at: where, counted from the end, their channels have to lie to be broadcast as they are stored.
        rank: dimensions of the norm's input.
    """
    if not names <= module._parameters.keys():
        return f"its weight or bias is a buffer of `{path}`, and no parameter"
    # A buffer that no checkpoint holds is no content, but would be missed by whoever reads it from outside.
    if more := (contents(module) | module._buffers.keys()) - names:
        listed = ", ".join(f"`{name}`" for name in sorted(more))
        return f"`{path}` holds more than the norm's weight and bias: {listed}"
    for name in sorted(names):
        shape = tuple(module.get_parameter(name).shape)
        aligned = -at.dim <= len(shape) <= rank and shape[at.dim] == at.size
        if shape != (at.size,) and not (aligned and math.prod(shape) == at.size):
            return f"`{path}` stores its {name} as {'x'.join(map(str, shape))}, which its norm does not apply as it is"
    return ""


def _boundary_in(node: fx.Node, path: str) -> tuple[list[int] | None, bool]:
    """Walk back from the norm's source to the input of its module.

    Returns:
        For each dimension of the source the dimension of the module's input it is; None if more happens on the way than
        casts and permutations. And whether there is a cast to float32.
    """
    float32 = False
    order = list(range(len(shape_of(node))))
    while True:
        key = boundary_of(node)
        if key is not None and key[:2] == (path, "input"):
            # A replacement is called with the first argument only.
            return (order if key[2] == "0" else None), float32
        step = _moved(node, path)
        if step is None:
            return None, float32
        float32 = float32 or is_float32_cast(node)
        node, dims = step
        back = {target: source for source, target in dims.items()}
        order = [back[d] for d in order]


def _boundary_out(node: fx.Node, path: str) -> list[int] | None:
    """Walk on from the norm to the output of its module: where each dimension of the norm's result is there."""
    order = list(range(len(shape_of(node))))
    while True:
        key = boundary_of(node)
        if key is not None and key[:2] == (path, "output"):
            # A key says that the module returns more than this value.
            return order if key[2] == "" else None
        users = list(readers(node))
        step = _moved(users[0], path) if len(users) == 1 else None
        if step is None:
            return None
        node, dims = users[0], step[1]
        order = [dims[d] for d in order]


def _moved(node: fx.Node, path: str) -> tuple[fx.Node, dict[int, int]] | None:
    """The operand of a cast or permutation inside the module, and where its dimensions go.

    Anything else between a module's boundary and its norm would be lost with the module.
    """
    if name_of(node) not in MOVES | COPIES or module_path(node) != path:
        return None
    terms = terms_of(node)
    if terms is None or len(terms) != 1 or len(terms[0]) != 1:
        return None
    return terms[0][0].node, dict(terms[0][0].dims)


def is_float32_cast(node: fx.Node) -> bool:
    """Whether the node casts to float32 by name."""
    return name_of(node) in ("aten.to", "aten._to_copy", "aten.float") and (
        torch.float32 in node.args or node.kwargs.get("dtype") is torch.float32 or name_of(node) == "aten.float"
    )


def _named_parameter(graph: Graph, node: Any, path: str) -> tuple[str | None, float]:
    """The name within the module of the parameter behind ``node``, and the number added to it (as in weight + 1)."""
    offset = 0.0
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            parameter = graph.parameters.get(node)
            names = parameter.aliases if parameter is not None else ()
            prefix = f"{path}."
            return next(
                (n[len(prefix) :] for n in names if n.startswith(prefix) and "." not in n[len(prefix) :]), None
            ), offset
        if name_of(node) == "aten.add" and plain(node) and is_number(node.args[1]):
            offset += float(node.args[1])  # type: ignore[arg-type]
        elif name_of(node) not in CASTS | {"aten.view", "aten.reshape", "aten.detach"}:
            return None, offset
        node = node.args[0]
    return None, offset
