"""LayerNorm -> CRMSNorm: mean-free streams stored in one channel less, without changing what the model computes.

For a stream that is read through P = I - 11'/d only, a value x may be replaced by the d - 1 numbers B x, if every
writer W becomes B W and each norm recovers P x = L B x (`runtime.BASES`): arXiv 2305.14858, section 3, is the basis
``paper``, where |P x|^2 = sum(y^2) + sum(y)^2 for y = B x; in the basis ``isometric`` it is |y|^2 up to a constant. The
norm's result is a mean-free value again, n, and is stored likewise: its readers become (W diag(g)) L and c + W b. Where
they cannot, the norm gives all channels, g * L n + b.

What cannot be written in d - 1 channels is compressed by an operation where that pays (`regions`). That the model runs
at the new sizes, and does the same, is proved by tracing it again (`comparison`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normconvert.analysis.channel_axes import ChannelAxis, carry_forward, shape_of
from normconvert.analysis.norms import Norm, by_path, find_norms, is_float32_cast
from normconvert.analysis.op_table import terms_of
from normconvert.analysis.streams import Analysis, AxisRef, Stream, described
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.centring import Centring, editability, insertion
from normconvert.rewrites.comparison import prove
from normconvert.rewrites.edited_trace import Differs
from normconvert.rewrites.expected_changes import ExpectedChanges, expected_changes
from normconvert.rewrites.fold import along
from normconvert.rewrites.folding import CASTS
from normconvert.rewrites.graph_values import narrowed
from normconvert.rewrites.readers import Reader, Unfoldable, readers_of
from normconvert.rewrites.regions import Boundaries, Region, Stays, choose_region
from normconvert.rewrites.registry import rewrite
from normconvert.rewrites.sizes import Remedies, resize_edits
from normconvert.rewrites.verdicts import Obstacle, misuse, never_called, obstacle
from normconvert.rewrites.writers import Edits, writer_edits
from normconvert.tracing.exits import exit_module
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import Boundary, boundary_of


@dataclass(frozen=True)
class _Model:
    """What is known of the traced model before anything is decided."""

    analysis: Analysis
    editability: Centring
    boundaries: Boundaries
    calls: dict[str, list[Norm]]
    where: dict[Norm, tuple[Stream, AxisRef]]
    obstacles: dict[str, Obstacle]
    options: Options

    @property
    def graph(self) -> Graph:
        return self.analysis.graph


@dataclass
class _Draft:
    """A plan, and what the proof has to find in the edited model."""

    region: Region
    folded: dict[str, tuple[list[Reader], set[AxisRef]]] = field(default_factory=dict)
    expanded: dict[str, str] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: Plan("crmsnorm"))
    expected: ExpectedChanges = field(default_factory=ExpectedChanges)


@rewrite("crmsnorm", compared="planner")
def plan_crmsnorm(graph: Graph, options: Options) -> Plan:
    """The plan that stores each stream which provably allows it in one channel less.

    Every norm gets a verdict. A stream is compressed between operations as a whole or not at all.
    """
    # An output in one channel less is another output, whatever the user allows of its mean.
    options = replace(options.for_method("crmsnorm"), allow_shifted_outputs=False)
    norms = find_norms(graph)
    analysis = Analysis(graph, norms)
    found, boundaries = editability(analysis, options)
    where = {norm: (stream, ref) for stream in analysis.streams for norm, ref in stream.norms}
    calls = by_path(norms)
    obstacles = {
        path: why
        for path, group in calls.items()
        if (why := obstacle(group, where, options) or misuse(path, group, graph)) is not None
    }
    model = _Model(analysis, found, boundaries, calls, where, obstacles, options)
    stay = {
        where[norm][1]: Stays(f"what the norm {described(path)} reads, and that norm cannot be converted")
        for path in obstacles
        for norm in calls[path]
        if norm in where
    }
    remedies = Remedies(graph)
    # Every round tries what was not tried before, or leaves more values as they are: it ends.
    while True:
        draft = _draft(model, choose_region(analysis, found, boundaries, stay, options.min_gain or 1), remedies)
        if not draft.region.compressed:
            return draft.plan
        try:
            prove(graph, draft.plan, draft.expected)
        except Differs as difference:
            values = {path: (starts | {s[0] for s in refs}) for path, starts, refs in _touched(draft)}
            if not remedies.next(difference, values, {s[1].size for s in draft.region.compressed}):
                stay |= remedies.surrender(difference, found.usable, draft.region.compressed)
                remedies = Remedies(graph)  # what was tried for the model as a whole may not be needed any more
        else:
            return draft.plan


def _touched(draft: _Draft) -> list[tuple[str, set[fx.Node], set[AxisRef]]]:
    """For each folded norm its readers, and the values between."""
    return [
        (path, set().union(*(r.nodes for r in readers)), values) for path, (readers, values) in draft.folded.items()
    ]


def _draft(model: _Model, region: Region, remedies: Remedies) -> _Draft:
    draft = _Draft(region)
    verdicts = [_verdict(model, region, path, group) for path, group in model.calls.items()]
    converted = [v.path for v in verdicts if v.converted]
    needed = [ref for ref in region.compressed if ref in model.editability.editable | model.editability.untied]
    needed += [ref for ref in region.compressed if ref in model.editability.scales]
    basis = model.options.basis
    change = {"op": "compress", "basis": basis}
    tensors, aliases, config, notes = writer_edits(model.analysis, model.editability, set(needed), change)
    # After the writers' edits, which say which name of a tied table is the copy.
    untied = _untied(model, region, tensors)
    for path in converted:
        try:
            if path in remedies.expanded:
                raise Unfoldable(remedies.expanded[path])
            draft.folded[path] = readers_of(model.analysis, model.calls[path], untied, new_biases=True)
        except Unfoldable as why:
            draft.expanded[path] = str(why)
    biases = _reader_edits(model, draft, tensors)
    compressed = _places(model, draft)
    # A head that is parted from its table and reads all channels.
    whole = [name for name, rows in tensors.items() if [row["op"] for row in rows] == ["copy"]]
    modules, removed = _module_edits(model, draft, compressed, biases, remedies, whole)
    float32 = any(n.float32 for path in converted for n in model.calls[path])
    float32 = float32 or any(is_float32_cast(ref[0]) for ref in region.compressed)
    draft.plan = Plan(
        method="crmsnorm",
        tensors=tensors,
        aliases=aliases,
        modules=modules,
        removed=removed,
        config=config,
        verdicts=[_converted(v, draft) if v.converted else v for v in verdicts]
        + never_called(model.graph, set(model.calls)),
        notes=notes + _notes(float32),
        float32_norms=float32,
        shifted_doors=_exits(model, region),
    )
    heads = {other: _shape(model.graph, own) for own, other in untied.items()}
    folded_heads = {r.weight: r.place for readers, _ in draft.folded.values() for r in readers}
    draft.expected = expected_changes(
        model.graph,
        draft.plan,
        compressed=compressed,
        live=model.analysis.live,
        biases=biases,
        untied={n: narrowed(s, [folded_heads[n]]) if n in folded_heads else s for n, s in heads.items()},
    )
    return draft


def _exits(model: _Model, region: Region) -> list[dict[str, str]]:
    """The ways out, other than the model's outputs, that return compressed values."""
    rows = [(name, exit_module(s[0])) for s in region.compressed for name in model.graph.exits.get(s[0], ())]
    return [{"door": name, "output": path} for name, path in sorted(set(rows))]


def _verdict(model: _Model, region: Region, path: str, group: list[Norm]) -> Verdict:
    kind = group[0].kind
    why = model.obstacles.get(path)
    if why is not None:
        # What a user may allow of another conversion is nothing to this one.
        reason = f"{why.returned}, in all its channels." if why.returned else why.reason
        return Verdict(path, kind, False, reason, why.code)
    # One call speaks for all: `regions` joins what the calls of a norm read.
    ref = model.where[group[0]][1]
    if ref not in region.compressed:
        root = region.reasons[ref]
        return Verdict(path, kind, False, f"{root[0]}.", root[1])
    return Verdict(path, kind, True, "", "converted")


def _converted(verdict: Verdict, draft: _Draft) -> Verdict:
    reason = "its stream is stored in one channel less, its weight and bias move into its readers."
    if verdict.path in draft.expanded:
        reason = f"its stream is stored in one channel less; it gives all channels: {draft.expanded[verdict.path]}."
    return replace(verdict, reason=reason)


def _untied(model: _Model, region: Region, tensors: Edits) -> dict[str, str]:
    """Tied table -> the name that its reading side has once it is untied."""
    found = {}
    for ref in model.editability.untied & region.compressed:
        parameter = model.graph.parameters[ref[0]]
        found[parameter.name] = next(n for n in parameter.aliases if tensors.get(n, [{}])[0].get("op") == "copy")
    return found


def _reader_edits(model: _Model, draft: _Draft, tensors: Edits) -> dict[fx.Node, str]:
    """Add the edits of the folded norms' readers; the new biases by reader."""
    biases: dict[fx.Node, str] = {}
    for path, (readers, _) in draft.folded.items():
        norm = model.calls[path][0].module or {}
        for reader in readers:
            axis = along(reader.place)
            written = tensors.get(reader.weight, [])
            copied = [row for row in written if row["op"] == "copy"]
            own = copied[0]["from"] if copied else reader.weight
            if norm.get("bias") is not None:
                product = {"op": "add_product", "weight": own, "by": f"{path}.{norm['bias']}", **axis}
                name = reader.bias
                if name is None:
                    name = f"{reader.module}.bias"
                    biases |= dict.fromkeys(reader.nodes, name)
                    new = {"op": "new", "shape": [_shape(model.graph, own)[reader.out]], "like": own}
                    # The reader may write into a stream itself; its new bias then takes the same change of basis.
                    after = [{**row, "axis": 0} for row in written if row.get("axis") == reader.out]
                    tensors[name] = [new, product, *after]
                else:
                    # W b has all channels, so it is added before the bias is compressed for the stream it writes into.
                    tensors[name] = [product, *tensors.get(name, [])]
            rows: list[dict[str, Any]] = []
            if norm.get("weight") is not None:
                rows.append({"op": "scale", "by": f"{path}.{norm['weight']}", **axis, "offset": norm["offset"]})
            # (W diag(g)) L: g has d channels, so it comes before L leaves d - 1 of them.
            rows.append({"op": "read_compressed", "basis": model.options.basis, **axis})
            tensors[reader.weight] = [*copied, *rows, *(row for row in written if row["op"] != "copy")]
    return biases


def _shape(graph: Graph, name: str) -> tuple[int, ...]:
    return shape_of(graph.tensors[name])


def _places(model: _Model, draft: _Draft) -> set[AxisRef]:
    """All values that have one channel less: of the streams, behind folded norms, and the weights on both sides."""
    found = set(draft.region.compressed)
    analysis = model.analysis
    for ref in draft.region.compressed & model.editability.scales.keys():
        made = model.analysis.provenance(ref)
        for part in made.parts:
            # What is between a writer and its layer scale is in no stream, and has one channel less as well.
            found |= analysis.grow(part).members.keys()
    for readers, values in draft.folded.values():
        found |= values
        for reader in readers:
            for node, parameter in model.graph.parameters.items():
                if parameter.name == reader.weight:
                    found |= _carried(node, reader.place, reader.nodes)
    return found


def _carried(node: fx.Node, place: ChannelAxis, until: frozenset[fx.Node]) -> set[AxisRef]:
    """A weight, and what it becomes on its way to the maps that use it."""
    found: set[AxisRef] = {(node, place)}
    for user in node.users:
        terms = terms_of(user) if user not in until else None
        if terms and len(terms) == 1 and len(terms[0]) == 1:
            further = carry_forward(terms[0][0], place, user)
            if further is not None:
                found |= _carried(user, further, until)
    return found


def _width(graph: Graph, key: Boundary, axis: int) -> int:
    """The number of channels at a module's boundary, in the original."""
    return int(next(shape_of(n)[axis] for n in graph.nodes if boundary_of(n) == key))


def _module_edits(
    model: _Model,
    draft: _Draft,
    compressed: set[AxisRef],
    biases: dict[fx.Node, str],
    remedies: Remedies,
    whole: Collection[str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows for the runtime, and the tensors that are gone."""
    basis = model.options.basis
    edits: list[dict[str, Any]] = []
    for key, axis in draft.region.inserted.items():
        row = {**insertion("compress", key, axis, model.editability), "basis": basis}
        # Embeddings from outside may be rows of the table itself, which has been compressed: their size tells.
        edits.append({**row, "size": _width(model.graph, key, axis)} if row.get("optional") else row)
    edits += resize_edits(model.graph, compressed, remedies.attributes, whole)
    weights = {node: reader for readers, _ in draft.folded.values() for reader in readers for node in reader.nodes}
    sizes = {}
    for node, name in biases.items():
        size = _shape(model.graph, weights[node].weight)[weights[node].out]
        place = next((s[1] for s in compressed if s[0] is node), None)
        sizes[name] = size if place is None else narrowed(tuple(shape_of(node)), [place])[place.dim]
    edits += [{"op": "bias", "path": n.rpartition(".")[0], "name": "bias", "size": k} for n, k in sizes.items()]
    removed = []
    for path in (*draft.folded, *draft.expanded):
        norm = dict(model.calls[path][0].module or {}, kind="crmsnorm", basis=basis, expand=path in draft.expanded)
        if path in draft.folded:
            dropped = [norm[key] for key in ("weight", "bias") if norm.get(key)]
            removed += [f"{path}.{leaf}" for leaf in dropped]
            norm |= {"weight": None, "bias": None, "offset": 0.0, "dropped": dropped}
        else:
            norm["mean_free"] = True
        edits.append(norm)
    return edits, removed


def _notes(float32: bool) -> list[str]:
    notes = [
        "hidden states inside the model have one channel less; its outputs are as before. The result loads with "
        "normconvert.load or trust_remote_code only: unmodified libraries refuse its shapes."
    ]
    return [*notes, CASTS] if float32 else notes
