"""A tied table becomes two tensors, of which the head's takes what the untied model does not do any more.

Some classes multiply what the head reads by a number if, and only if, the config says that it is tied. The edited model
is traced, and the number goes into the head where the two graphs are one but for that product: c (W x) = (c W) x.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from normconvert.analysis.channel_axes import shape_of
from normconvert.rewrites.comparison import compare
from normconvert.rewrites.edited_trace import Differs, trace_edited
from normconvert.rewrites.expected_changes import ExpectedChanges, SameAs
from normconvert.rewrites.ties import as_taken, scaled_heads, untied_config
from normconvert.tracing.graph import Graph

UNTIED = "`{}` and `{}` are no longer tied: the output has one table more."

_numbers: WeakKeyDictionary[nn.Module, dict[str, float | None]] = WeakKeyDictionary()
"""Model -> head -> the number that it takes: a plan is made several times, and a trace takes seconds."""


def untie_head(
    graph: Graph, own: str, head: str, tensors: dict[str, list[dict[str, Any]]], config: dict[str, Any]
) -> str:
    """Give a head a tensor of its own, as its table is.

    Args:
        graph: the model.
        own: a name of the table.
        head: that of the head.
        tensors: tensor -> its edits; gains the head.
        config: of the model; says so.

    Returns:
        A sentence for the user.
    """
    model = graph.modules[""]
    known = _numbers.setdefault(model, {})
    if head not in known:
        known[head] = _vanished(graph, head)
    tensors[head] = [{"op": "copy", "from": own}]
    if (number := known[head]) is not None:
        tensors[head].append({"op": "scale", "by": number, "axis": 1})
    config |= untied_config(model)
    return UNTIED.format(own, head)


def _vanished(graph: Graph, head: str) -> float | None:
    """The number by which a head's input is multiplied no more once the config says that it is untied."""
    model: Any = graph.modules[""]
    found = scaled_heads(graph).get(head)
    config = untied_config(model)
    if found is None:
        return None
    if all(getattr(model.config, key, None) == value for key, value in as_taken(model, config).items()):
        return None  # it says so already
    number, products = found
    untied = {head: shape_of(graph.tensors[head])}
    labels = {node: SameAs(node.args[0]) for node in products}  # type: ignore[arg-type]
    try:
        compare(graph, trace_edited(graph, (), untied, config), ExpectedChanges(labels, untied=untied))
    except Differs:  # it stays, or more changes: whoever compares the plan's model finds that
        return None
    return number
