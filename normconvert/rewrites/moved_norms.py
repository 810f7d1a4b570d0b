"""A norm's weight and bias on their way into the linear maps that read it, with or without a change of basis between.

With n the normalised value, W (g * n + b) + c = (W diag(g)) n + (W b + c). A reader without a bias of its own leaves
the norm's where it is, divided by the weight that has gone: W diag(g) (n + b / g), where b is zero if g is. In the
basis of an orthogonal Q the readers get Q n, and are (W diag(g)) Q'; a bias that stays is Q (b / g).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.analysis.norms import Norm
from normconvert.analysis.streams import Analysis, AxisRef, Stream
from normconvert.rewrites.centring import can_untie
from normconvert.rewrites.fold import product, reading
from normconvert.rewrites.readers import Reader, Unfoldable, readers_of
from normconvert.rewrites.ties import table_and_head
from normconvert.rewrites.untying import untie_head
from normconvert.rewrites.writers import Edits
from normconvert.tracing.exits import exit_module
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import EMBEDDING, name_of, readers

HIDDEN = "hidden_states"
"""The way out of transformers models that returns the outputs of layers and of the norm behind them."""


@dataclass(frozen=True)
class Moved:
    """A norm whose weight moves.

    Attributes:
        calls: all calls of it.
        readers: the linear maps that take the weight.
        values: what the norm gives, on its way to them.
        bias_stays: one of them cannot take the bias.
        at: where a stream's channels are in what the norm gives, which may be several values of it beside each other.
    """

    calls: list[Norm]
    readers: list[Reader]
    values: set[AxisRef]
    bias_stays: bool
    at: ChannelAxis | None = None

    @property
    def path(self) -> str:
        """The norm's module path."""
        return self.calls[0].path

    def channels(self, axis: Mapping[str, Any]) -> dict[str, Any]:
        """Where a stream's channels are along an axis of an edit on which what the norm gives lies."""
        if self.at is None or self.at.whole:
            return dict(axis)
        outer, inner = axis.get("outer", 1) * self.at.outer, self.at.inner * axis.get("inner", 1)
        return {**axis, "outer": int(outer), "inner": int(inner)}


def moved_norm(
    analysis: Analysis, calls: list[Norm], untied: dict[str, str], *, through: Collection[str] = ()
) -> Moved:
    """Where a norm's weight and bias go.

    Args:
        analysis: the streams.
        calls: all calls of the norm.
        untied: tied table -> name that its reading side has once it is untied.
        through: codes of leaks that are passed over, since what they return may change.

    Raises:
        Unfoldable: the weight cannot move.
    """
    try:
        return Moved(calls, *readers_of(analysis, calls, untied, through=through, parts=True), bias_stays=False)
    except Unfoldable:
        found = readers_of(analysis, calls, untied, bias_stays=True, through=through, parts=True)
        return Moved(calls, *found, bias_stays=True)


def doors_behind(graph: Graph, norms: Iterable[Moved]) -> list[dict[str, str]]:
    """The ways out, other than the model's outputs, that return what such norms give."""
    exits = [(node, name) for node, names in graph.exits.items() for name in names]
    inside = tuple(f"{exit_module(node)}." for node, name in exits if name == HIDDEN)
    rows = []
    for moved in norms:
        given = {node for node, _ in moved.values}
        rows += [(name, exit_module(node)) for node, name in exits if node in given]
        # Behind the layers whose outputs they are, hidden states end with what the last norm gives.
        rows += [(HIDDEN, moved.path)] if inside and not moved.path.startswith(inside) else []
    return [{"door": name, "output": path} for name, path in dict.fromkeys(rows)]


def shifted_outputs(graph: Graph, streams: Iterable[Stream], norms: Iterable[Moved]) -> list[str]:
    """The model's outputs that are values of such streams, or what such norms give."""
    nodes = {node for stream in streams for node, _ in stream.members}
    nodes |= {node for moved in norms for node, _ in moved.values}
    found = dict.fromkeys(name for node, names in graph.outputs.items() if node in nodes for name in names)
    # Of a list with a value for each image, say, another call may return more.
    kept = {_list_of(name) for node, names in graph.outputs.items() if node not in nodes for name in names}
    return list(dict.fromkeys(_list_of(name) if _list_of(name) not in kept else name for name in found))


def other_outputs(graph: Graph, shifted: Collection[str]) -> list[str]:
    """The model's outputs that are none of these."""
    names = (name for names in graph.outputs.values() for name in names)
    return [name for name in names if name not in shifted and _list_of(name) not in shifted]


def _list_of(name: str) -> str:
    """The output that a value is an item of; else its own name."""
    whole, _, item = name.rpartition(".")
    return whole if whole and item.isdigit() else name


def tables_to_untie(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """Embeddings that are an output head, too, and can be two tensors: name -> their names as table and as head."""
    found = {}
    for node, parameter in analysis.graph.parameters.items():
        heads = [user for user in readers(node) if name_of(user) != EMBEDDING]
        shape = shape_of(node)
        tied = len(parameter.aliases) > 1 and len(shape) == 2
        if tied and can_untie(analysis, (node, ChannelAxis(1, int(shape[1]))), heads):
            found[parameter.name] = table_and_head(analysis.graph, node)
    return found


def untie(
    graph: Graph, tied: Iterable[tuple[str, str]], norms: Iterable[Moved], tensors: Edits, config: dict[str, Any]
) -> list[str]:
    """Give the heads that take a norm's weight a tensor of their own, where they have none yet.

    Args:
        graph: the model.
        tied: tables, by their names as the embedding and as the head.
        norms: those that move.
        tensors: tensor -> its edits; gains the heads.
        config: of the model; says so.

    Returns:
        Sentences for the user.
    """
    read = {reader.weight for moved in norms for reader in moved.readers}
    notes = []
    for own, head in tied:
        if head in read and head not in tensors:
            notes.append(untie_head(graph, own, head, tensors, config))
    return notes


def move(graph: Graph, moved: Moved, tensors: Edits, change: Mapping[str, Any] | None = None) -> None:
    """Add the edits that move a norm's weight and bias to ``tensors``, which holds those of the writers.

    Args:
        graph: the model.
        moved: the norm.
        tensors: tensor -> its edits.
        change: of the basis in which the readers get what the norm gives: an edit without its axis.
    """
    settings = moved.calls[0].module or {}
    path, offset = moved.path, settings["offset"]
    weight = f"{path}.{settings['weight']}" if settings.get("weight") else None
    bias = f"{path}.{settings['bias']}" if settings.get("bias") else None
    for reader in moved.readers:
        axis = reading(reader)
        written = tensors.get(reader.weight, [])
        copied = [row for row in written if row["op"] == "copy"]
        rows: list[dict[str, Any]] = [{"op": "scale", "by": weight, **axis, "offset": offset}] if weight else []
        # W diag(g) first: what follows is in the other basis.
        rows += [{**change, **moved.channels(axis)}] if change else []
        tensors[reader.weight] = [*copied, *rows, *(row for row in written if row["op"] != "copy")]
        if bias and not moved.bias_stays:
            own = copied[0]["from"] if copied else reader.weight
            # Before what the reader's own results take for the stream that it writes into.
            tensors[str(reader.bias)] = [product(reader, own, bias), *tensors.get(str(reader.bias), [])]
    if weight:
        tensors[weight] = [{"op": "fill", "value": 1.0 - offset}]
    if bias and not moved.bias_stays:
        tensors[bias] = [{"op": "fill", "value": 0.0}]
    elif bias:
        at = {"axis": _channels(graph, bias, int(settings["size"]))}
        gain: Any = ["add", weight, offset] if offset else weight
        stays: list[dict[str, Any]] = [{"op": "divide", "by": gain, **at}] if weight else []
        stays += [{**change, **moved.channels(at)}] if change else []
        if stays:
            tensors[bias] = stays


def _channels(graph: Graph, name: str, size: int) -> int:
    """The dimension of a norm's vector along which its channels lie."""
    return next((dim for dim, n in enumerate(shape_of(graph.tensors[name])) if n == size), 0)
