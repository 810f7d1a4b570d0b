"""Doors: the other ways into and out of a model, each traced as a further call, so that one proof covers all.

- Embeddings from outside, and what an encoder returned before (``inputs_embeds``, ``encoder_outputs``).
- What a call returns more if it is asked to: a loss for labels, a cache, what a flag switches on. They are asked for
  together, beside embeddings where there are some, since each call costs a trace.
- Methods of features (``get_image_features``), which return what ``forward`` may keep to itself: those are ways out, of
  which a conversion may change what they return, if it says so.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from normconvert.errors import TraceError
from normconvert.tracing.exits import BY_LAYER, METHODS, layers_are_named, ways_by_layer
from normconvert.tracing.graph import Graph, merge, trace
from normconvert.tracing.probes import quiet
from normconvert.tracing.probes.choose import is_timm
from normconvert.tracing.probes.entrances import Entrance, entrance_names, entrances
from normconvert.tracing.probes.extras import encoder_outputs, extra_arguments, feature_methods

Inputs = dict[str, Any]
_WAYS = re.compile(r"(forward|encode|decode|embed|extract|features|get_\w*(features|layers|states))")


def with_doors(model: nn.Module, graph: Graph, inputs: Inputs) -> Graph:
    """The graph with a call for each door that can be traced; the others are named in ``untraced_doors``.

    Args:
        model: on the meta device.
        graph: of a call with ``inputs``; taken over.
        inputs: keyword arguments of that call.
    """
    shapes = _output_shapes(graph)
    extras = extra_arguments(model, inputs, shapes)
    names = [*entrance_names(model, inputs), *extras]
    found: set[str] = set()
    with quiet():
        for call, taken in _calls(model, inputs, extras):
            graph = merge(graph, call)
            found |= taken
        if (inside := encoder_outputs(model, inputs, shapes)) is not None:
            names.append("encoder_outputs")
            if (entered := _traced(model, Entrance(("encoder_outputs",), inside))) is not None:
                graph = merge(graph, entered)
                found.add("encoder_outputs")
        for method, arguments in feature_methods(model, inputs):
            names.append(method)
            try:
                call = trace(model, arguments, method)
            except TraceError:
                continue
            graph = merge(graph, call)
            found.add(method)
        if is_timm(model) and hasattr(model, BY_LAYER[0]) and not layers_are_named(model):
            names.append(BY_LAYER[0])
            with suppress(TraceError):
                call = trace(model, inputs, BY_LAYER[0])
                graph = merge(graph, replace(call, exits=dict.fromkeys(call.exits, ways_by_layer(model))))
                found.add(BY_LAYER[0])
    return replace(
        graph,
        doors=tuple(name for name in names if name in found),
        untraced_doors=tuple(name for name in names if name not in found),
    )


def _calls(model: nn.Module, inputs: Inputs, extras: Inputs) -> Iterator[tuple[Graph, set[str]]]:
    """Traced calls with embeddings from outside and with what else a call may be asked for; and the names of both."""
    found: set[str] = set()
    for alternatives in entrances(model, inputs):
        if not alternatives or found.issuperset(alternatives[0].names):
            continue
        more = {} if found.issuperset(extras) else extras
        # The model's own embeddings are of that shape, too, so labels that fit one call fit the other.
        tries = [(entrance, some) for entrance in alternatives for some in ([more, {}] if more else [{}])]
        for entrance, some in tries:
            if (call := _traced(model, replace(entrance, inputs={**entrance.inputs, **some}))) is not None:
                found |= {*entrance.names, *some}
                yield call, {*entrance.names, *some}
                break
    if found.issuperset(extras):
        return
    # Together, else one by one: what stops one of them stops a call with all.
    for some in [extras, *({name: value} for name, value in extras.items())] if len(extras) > 1 else [extras]:
        if not found.issuperset(some) and (call := _traced(model, Entrance((), {**inputs, **some}))) is not None:
            found |= some.keys()
            yield call, set(some)


def _traced(model: nn.Module, entrance: Entrance) -> Graph | None:
    """The graph of a call, with the placeholders noted of what comes from outside; None if it cannot be traced."""
    try:
        graph = trace(model, entrance.inputs)
    except TraceError:
        return None
    nodes = [n for n in graph.nodes if n.op == "placeholder" and n not in graph.parameters]
    return replace(graph, outside=frozenset(n for n in nodes if n.name.startswith(entrance.names)))


def _output_shapes(graph: Graph) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of what the first call returns."""
    return {
        name: tuple(int(n) for n in node.meta["val"].shape)
        for node, names in graph.outputs.items()
        for name in names
        if hasattr(node.meta.get("val"), "shape")
    }


def not_given(model: nn.Module, calls: tuple[Inputs, ...]) -> list[str]:
    """What is known of no call: arguments of ``forward`` that none of them gives, and other ways into the model.

    Those are methods of its own that are named as such ways are (``encode_image``, ``forward_intermediates``).
    """
    given = {name for call in calls for name in call}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = inspect.signature(model.forward).parameters.values()
    arguments = [p.name for p in named if p.kind not in kinds and p.name not in given]
    own = [name for name in dir(type(model)) if _WAYS.match(name) and not hasattr(nn.Module, name)]
    return arguments + [name for name in own if callable(getattr(type(model), name)) and name not in METHODS]
