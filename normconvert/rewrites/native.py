"""The converted model as the library's own: a class that has RMSNorm in the same places and is the same otherwise.

A table proposes classes (`normconvert.sources.native_models`). One is taken if its graph, traced with the inputs of the
original, is the original's operation by operation, where each norm has become an RMSNorm of the same input, axis and ε;
and if every tensor that it has is one that the conversion makes. A norm's bias for which that class has no place moves
into the linear maps that read the norm, W (n + b) + c = W n + (W b + c); a weight that only that class has is ones.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.analysis.streams import Analysis, described
from normconvert.errors import InputError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.comparison import compare
from normconvert.rewrites.edited_trace import Differs, trace_as
from normconvert.rewrites.expected_changes import ExpectedChanges, Renormed, Replaced, expected_changes
from normconvert.rewrites.families import renamed, same_edits
from normconvert.rewrites.fold import along
from normconvert.rewrites.graph_values import same_value
from normconvert.rewrites.moved_norms import Moved, doors_behind
from normconvert.rewrites.norm_calls import norm_calls
from normconvert.rewrites.planning import plan_graph
from normconvert.rewrites.readers import Unfoldable, readers_of
from normconvert.rewrites.writers import Edits
from normconvert.sources.native_models import Native, as_native, natives
from normconvert.sources.source import Source
from normconvert.sources.transformers_models import own_class
from normconvert.tracing.graph import Graph
from normconvert.tracing.known_values import KnownValues
from normconvert.tracing.model_graph import trace_model
from normconvert.wording.words import EXACT


class NoNative(Exception):
    """Why the library has no such model."""


@dataclass
class _Tensors:
    """What becomes of tensors beside the conversion's own edits.

    Attributes:
        edits: tensor -> its edits, the conversion's among them.
        removed: those that the library's model does not have.
        moved: norms whose bias moves.
    """

    edits: Edits
    removed: list[str]
    moved: list[Moved]


def native_plan(source: Source, plan: Plan, graph: Graph) -> Plan:
    """The plan whose output is the library's own model with RMSNorm; or one that converts nothing, and says why.

    Args:
        source: what is converted.
        plan: of rmsnorm.
        graph: of the model.
    """
    if not plan.converted:
        return plan
    try:
        return _first_that_fits(source, plan, graph)
    except NoNative as why:
        return replace(Plan(plan.method), verdicts=[_refused(v, f"{why}") if v.converted else v for v in plan.verdicts])


def _refused(verdict: Verdict, why: str) -> Verdict:
    reason = f"it could be RMSNorm, but there is no model of the library's own for it (--native): {why}."
    return Verdict(verdict.path, verdict.kind, False, reason, "not-native")


def _first_that_fits(source: Source, plan: Plan, graph: Graph) -> Plan:
    if source.record is not None or own_class(source) is not None or source.library == "torch":
        raise NoNative("the model is code of its own, or was converted already")
    if source.merged or not source.one_to_one:
        raise NoNative(f"{source.library} merges or splits tensors of this checkpoint when it loads them")
    if stays := next(iter(plan.kept), None):
        raise NoNative(f"{described(stays.path)} stays {stays.kind}: {stays.reason.rstrip('.')}")
    if row := next((row for row in plan.modules if row["op"] != "replace"), None):
        raise NoNative(
            f"an operation would have to stand at the {row.get('side', 'place')} of {described(row['path'])}"
        )
    sizes = {row["eps"] for row in plan.modules}
    if len(sizes) != 1:
        raise NoNative(f"its norms have {len(sizes)} different ε")
    reasons = []
    for native in natives(source, float(next(iter(sizes)))):
        try:
            return _as(native, source, plan, graph)
        except (NoNative, Differs, InputError) as why:
            reasons.append(f"{native.words}: {_in_words(why, source)}")
    raise NoNative("; ".join(reasons) or f"none of {source.library} is known that might be")


def _in_words(why: Exception, source: Source) -> str:
    """Why a model is not the converted one, without where the source is."""
    if isinstance(why, Differs) and why.path:
        return f"{described(why.path)}: {why}"
    if isinstance(why.__cause__, TypeError):  # what Python says of arguments is nothing that a user has given
        return f"{source.architecture} cannot be built so"
    return f"{why}".removeprefix(f"{source.reference}: ")


def _as(native: Native, source: Source, plan: Plan, graph: Graph) -> Plan:
    """The plan for one model.

    Raises:
        NoNative: that has other tensors, or a norm's bias has nowhere to go.
        Differs: it computes something else.
        InputError: it cannot be built.
    """
    with as_native(source, native, plan.config) as there:
        model = _with_same_constants(source, there)
    original = graph.modules[""]
    model = model.to(next(p.dtype for p in original.parameters() if p.is_floating_point()))
    new = trace_as(graph, model)
    # Another class casts at other places, and rounds there.
    rewritten = native.architecture != source.architecture
    compare(graph, new, replace(_expected(graph, plan), rewritten=rewritten))
    tensors = _tensors(source, plan, graph, new)
    _refuse_other_tensors(original, model, tensors)
    doors = [row for row in doors_behind(graph, tensors.moved) if row not in plan.shifted_doors]
    notes = []
    if doors:
        names = ", ".join(dict.fromkeys(row["door"] for row in doors))
        notes.append(f"{EXACT}what a norm gives, without its bias: {names}")
    return replace(
        plan,
        tensors=tensors.edits,
        modules=[],
        removed=[*plan.removed, *tensors.removed],
        config={**plan.config, **native.config},
        shifted_doors=[*plan.shifted_doors, *doors],
        untraced_doors=[*plan.untraced_doors, *_other_doors(original, model)],
        notes=[*plan.notes, *notes],
        float32_norms=plan.float32_norms or rewritten,
        native=native.architecture,
    )


def _with_same_constants(source: Source, there: Source) -> nn.Module:
    """The skeleton of the other model, whose tensors that no checkpoint holds have the values of the source's.

    Raises:
        NoNative: one has others, or values that cannot be known.
    """
    (model, now), (_, before) = _constants(there), _constants(source)
    for name in dict.fromkeys([*before, *now]):
        a, b = before.get(name), now.get(name)
        if not same_value(a, b) or a is None:
            raise NoNative(f"`{name}`, which no checkpoint holds, has other values there, or they are not known")
    return model


def _constants(source: Source) -> tuple[nn.Module, dict[str, Tensor | None]]:
    """A skeleton, and the values that its constructor gives its floating buffers that no checkpoint holds."""
    with KnownValues() as values:
        model = source.skeleton()
    stored = model.state_dict()
    buffers = ((n, b) for n, b in model.named_buffers() if n not in stored and b.is_floating_point())
    return model, {name: values.value(buffer) for name, buffer in buffers}


def _expected(graph: Graph, plan: Plan) -> ExpectedChanges:
    """The changes that the plan asks for, each norm an RMSNorm of another class."""
    found = expected_changes(graph, plan)
    labels = {
        node: Renormed(label.path, label.source, label.settings) if isinstance(label, Replaced) else label
        for node, label in found.labels.items()
    }
    return replace(found, labels=labels)


def _tensors(source: Source, plan: Plan, graph: Graph, new: Graph) -> _Tensors:
    """What becomes of the norms' weights and biases.

    Raises:
        NoNative: a norm's bias has nowhere to go, or the weights mean something else there.
    """
    analysis = Analysis(graph, find_norms(graph))
    groups = by_path(analysis.norms)
    found = _Tensors({name: list(rows) for name, rows in plan.tensors.items()}, [], [])
    for path, calls in norm_calls(new, {v.path for v in plan.converted}).items():
        old, now = groups[path][0].module or {}, next(calls).norm.module or {}
        if old["weight"] is None and now["weight"] is not None:
            found.edits[f"{path}.{now['weight']}"] = _ones(old["size"], now["offset"], _beside(analysis, groups[path]))
        elif old["offset"] != now["offset"] or old["weight"] != now["weight"]:
            raise NoNative(f"the weight of {described(path)} means something else there")
        if old["bias"] is not None and now["bias"] is None:
            _move_bias(analysis, groups[path], found)
    return found


def _ones(size: int, offset: float, like: str) -> list[dict[str, Any]]:
    """The edits that make the weight of a norm that has none."""
    return [{"op": "new", "shape": [size], "like": like}, {"op": "fill", "value": 1.0 - offset}]


def _beside(analysis: Analysis, calls: list[Norm]) -> str:
    """The stored tensor that a new weight of a norm is stored beside: of what reads it, else any."""
    try:
        return readers_of(analysis, calls, bias_stays=True, through=("features",))[0][0].weight
    except Unfoldable:
        return next(p.name for p in analysis.graph.parameters.values() if p.stored)


def _move_bias(analysis: Analysis, calls: list[Norm], found: _Tensors) -> None:
    """Add the edits that move a norm's bias into the linear maps that read it."""
    path = calls[0].path
    bias = f"{path}.{(calls[0].module or {})['bias']}"
    found.removed.append(bias)
    if [row["op"] for row in found.edits.get(bias, [])] == ["fill"]:
        return  # folded already
    # Gone from the files; whoever edits the original's own class sees zeros.
    found.edits[bias] = [{"op": "fill", "value": 0.0}]
    try:
        readers, values = readers_of(analysis, calls, through=("features",))
    except Unfoldable as why:
        raise NoNative(f"the bias of {described(path)} would have to move into what reads it: {why}") from why
    for reader in readers:
        row = {"op": "add_product", "weight": reader.weight, "by": bias, **along(reader.place)}
        # Before what the reader's own results take for the stream that it writes into.
        found.edits[str(reader.bias)] = [row, *found.edits.get(str(reader.bias), [])]
    found.moved.append(Moved(calls, readers, values, bias_stays=False))


def _refuse_other_tensors(original: nn.Module, model: nn.Module, tensors: _Tensors) -> None:
    """Refuse a model that stores other tensors than the conversion makes.

    Raises:
        NoNative: the first of them.
    """
    made = {name: tuple(value.shape) for name, value in original.state_dict().items() if name not in tensors.removed}
    new = {name: rows[0]["shape"] for name, rows in tensors.edits.items() if rows and rows[0]["op"] == "new"}
    made |= {name: tuple(shape) for name, shape in new.items()}
    there = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in dict.fromkeys([*made, *there]):
        if made.get(name) != there.get(name):
            raise NoNative(f"`{name}` is {there.get(name, 'no tensor')} there, and {made.get(name, 'none')} here")


def _other_doors(original: nn.Module, model: nn.Module) -> list[str]:
    """Arguments of ``forward`` that the original has not."""
    known, there = (inspect.signature(one.forward).parameters for one in (original, model))
    return [name for name in there if name not in known]


def native_obstacle(source: Source, plan: Plan, options: Options) -> str:
    """Why another class of the source's family is not the class of the output's family that it should be; or empty.

    Args:
        source: opened as that class.
        plan: for the class that is converted.
        options: that it was made with.

    Raises:
        NormConvertError: it cannot be built or traced.
    """
    model = source.skeleton()
    graph = trace_model(model)
    own = native_plan(source, plan_graph(graph, options, plan.method), graph)
    if not own.native:
        return next((v.reason.rstrip(".") for v in own.kept), "it has no norms")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {*model.state_dict(), *own.tensors}
    edits = {here: rows for name, rows in plan.tensors.items() if (here := renamed(name, prefix, names)) is not None}
    own, there = replace(own, tensors=_anywhere(own.tensors)), replace(plan, modules=[])
    same = same_edits(own, there, _anywhere(edits), prefix, (), names)
    return "" if same else "its own conversion would be another one"


def _anywhere(tensors: Edits) -> Edits:
    """Edits without the tensors that new ones are stored beside."""
    return {name: [{k: v for k, v in row.items() if k != "like"} for row in rows] for name, rows in tensors.items()}
