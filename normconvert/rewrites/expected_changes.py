"""What a plan is expected to change in a model's graph: a label for each node that does not stay as it is.

The labels come from the rows of the plan, and what they say from the graph of the original: the settings of a norm that
is replaced are those that the analysis found there, whatever the row says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normconvert.analysis.affine_norms import find_affine_norms
from normconvert.analysis.channel_axes import shape_of
from normconvert.analysis.norms import find_norms
from normconvert.analysis.parallel_branches import find_blocks
from normconvert.analysis.streams import AxisRef
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.clipping import clamp_behind
from normconvert.rewrites.edited_trace import Differs
from normconvert.rewrites.epsilons import epsilon_node
from normconvert.rewrites.ties import scaled_heads
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARKER, unmarked


@dataclass(frozen=True)
class Gone:
    """It does not run any more."""


@dataclass(frozen=True)
class SameAs:
    """The result of an absorbed norm, or of a product whose number a head has taken: it is what was read there."""

    source: fx.Node


@dataclass(frozen=True)
class Inserted:
    """At a module's boundary: an operation stands there now. ``what`` is ``center``, or ``compress`` and a basis."""

    what: str
    axis: int


@dataclass(frozen=True)
class Replaced:
    """The last operation of a norm: another norm reads ``source`` now, with the tensors named and these settings."""

    path: str
    source: fx.Node
    tensors: tuple[str | None, str | None]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Renormed:
    """The last operation of a norm: the RMSNorm of another class reads ``source`` now, whatever it is made of."""

    path: str
    source: fx.Node
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Biased:
    """A linear map is given a bias."""

    name: str


@dataclass(frozen=True)
class Clamped:
    """The last operation of a norm: a clamp of ``source`` stands there, and gives what ``activation`` gave."""

    path: str
    source: fx.Node
    activation: fx.Node


@dataclass(frozen=True)
class Merged:
    """The last operation of a block's branches: one convolution of ``source`` stands there."""

    path: str
    source: fx.Node
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Epsilon:
    """The operation of a norm that holds its eps: it holds another."""

    old: float
    new: float


Label = Gone | SameAs | Inserted | Replaced | Renormed | Biased | Clamped | Merged | Epsilon


@dataclass(frozen=True)
class ExpectedChanges:
    """What is expected to differ, and no more.

    Attributes:
        labels: node of the original's graph -> what becomes of it; one without a label stays as it is.
        compressed: values, and stored tensors, in one channel less.
        live: values that matter to what the model returns; None: all do.
        untied: names that are tensors of their own now, and their shapes.
        rewritten: the new graph is of a class that was written anew: independent operations may run in another order,
            and casts between floating dtypes may be others, which is another rounding and the same algebra.
    """

    labels: Mapping[fx.Node, Label] = field(default_factory=dict)
    compressed: Collection[AxisRef] = ()
    live: Collection[fx.Node] | None = None
    untied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rewritten: bool = False


def expected_changes(
    graph: Graph,
    plan: Plan,
    *,
    compressed: Collection[AxisRef] = (),
    live: Collection[fx.Node] | None = None,
    untied: Mapping[str, tuple[int, ...]] | None = None,
    biases: Mapping[fx.Node, str] | None = None,
) -> ExpectedChanges:
    """What the module edits of ``plan`` are expected to change in ``graph``.

    Args:
        graph: of the original.
        plan: its rows ``modules`` and ``removed`` are read.
        compressed: see :class:`ExpectedChanges`.
        live: as there.
        untied: as there; None: those that ``plan`` copies, in the shapes that they have.
        biases: linear map -> name of the bias it is given; None: all that read the weight beside a new bias.

    Raises:
        Differs: a row names what the graph has not.
    """
    rows: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for row in plan.modules:
        rows[row["op"]][(row["path"], row["side"], row["key"]) if "side" in row else row["path"]] = row
    labels: dict[fx.Node, Label] = {node: Gone() for node in _made_of(graph, set(plan.removed))}
    for op, label in _LABELS.items():
        if op in rows:
            labels |= label(graph, rows[op])
    if biases is None:
        biases = _new_biases(graph, rows["bias"]) if "bias" in rows else {}
    labels |= {node: Biased(name) for node, name in biases.items()}
    labels |= _taken_by_heads(graph, plan)
    if untied is None:
        copies = {name for name, edits in plan.tensors.items() if edits and edits[0]["op"] == "copy"}
        untied = {name: shape_of(node) for name, node in graph.tensors.items() if name in copies}
    return ExpectedChanges(labels, compressed, live, untied)


Rows = Mapping[Any, Mapping[str, Any]]


def _taken_by_heads(graph: Graph, plan: Plan) -> dict[fx.Node, Label]:
    """The products with a number that an untied head has taken: what they multiply is left."""
    found: dict[fx.Node, Label] = {}
    for name, (number, products) in scaled_heads(graph).items():
        if {"op": "scale", "by": number, "axis": 1} in plan.tensors.get(name, []):
            found |= {node: SameAs(node.all_input_nodes[0]) for node in products}
    return found


def _insertions(graph: Graph, rows: Rows) -> dict[fx.Node, Label]:
    found: dict[fx.Node, Label] = {}
    for node in graph.nodes:
        row = rows.get(tuple(node.args[1:4])) if node.target is MARKER else None
        if row is not None:
            what = f"compress {row['basis']}" if row["op"] == "compress" else "center"
            found[node] = Inserted(what, row["axis"])
    return found


def _replacements(graph: Graph, rows: Rows, uncentred: bool = False) -> dict[fx.Node, Label]:
    inside = tuple(f"{path}." for path in rows)
    found: dict[fx.Node, Label] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not MARKER:
            path = module_path(node)
            if path in rows or path.startswith(inside):
                found[node] = Gone()
    settings = {norm.path: norm.module for norm in find_norms(graph, uncentred=uncentred)}
    entered: dict[str, fx.Node] = {}
    for node in graph.nodes:
        path = str(node.args[1]) if node.target is MARKER else ""
        if path in rows and node.args[2:4] == ("input", "0"):
            entered[path] = node
        elif path in rows and node.args[2:4] == ("output", ""):
            known = settings.get(path)
            if known is None or path not in entered:
                raise Differs(path, f"`{path}` is no norm that another could stand in for")
            found[unmarked(node)] = _replaced(path, entered[path], known, rows[path])
    return found


def _renewals(graph: Graph, rows: Rows) -> dict[fx.Node, Label]:
    """As replacements; the eps is another, and the norm need not be a LayerNorm."""
    found = _replacements(graph, rows, uncentred=True)
    return {
        node: replace(label, settings={**label.settings, "eps": float(rows[label.path]["eps"])})
        if isinstance(label, Replaced)
        else label
        for node, label in found.items()
    }


def _replaced(path: str, source: fx.Node, known: Mapping[str, Any], row: Mapping[str, Any]) -> Replaced:
    """What stands in for a norm, by what is known of it; the row alone says whether its weight and bias are dropped."""
    dropped = set(row.get("dropped", ()))
    names = [known[key] if known[key] not in dropped else None for key in ("weight", "bias")]
    compressed = row["kind"] == "crmsnorm"
    settings = {
        "kind": row["kind"],
        "size": known["size"] - (compressed and not row["expand"]),
        "eps": known["eps"],
        "axis": known["axis"],
        # What is added to a weight that is dropped has moved with it.
        "offset": 0.0 if known["weight"] in dropped else known["offset"],
        "channels_last": known.get("channels_last", False),
        **({key: row[key] for key in ("basis", "expand")} if compressed else {}),
    }
    weight, bias = (f"{path}.{name}" if name else None for name in names)
    return Replaced(path, source, (weight, bias), settings)


def _absorptions(graph: Graph, rows: Rows) -> dict[fx.Node, Label]:
    found: dict[fx.Node, Label] = {}
    for norm in find_affine_norms(graph):
        for call in norm.calls if norm.path in rows else ():
            found |= dict.fromkeys(call.nodes, Gone()) | {call.result: SameAs(call.source)}
    return found


def _clamps(graph: Graph, rows: Rows) -> dict[fx.Node, Label]:
    found: dict[fx.Node, Label] = {}
    for norm in find_affine_norms(graph):
        for call in norm.calls if norm.path in rows else ():
            activation = clamp_behind(graph, norm, call).node
            found |= dict.fromkeys({*call.nodes, activation}, Gone())
            found[unmarked(call.result)] = Clamped(norm.path, call.source, activation)
    return found


def _merges(graph: Graph, rows: Rows) -> dict[fx.Node, Label]:
    found: dict[fx.Node, Label] = {}
    for block in find_blocks(graph):
        for call in block.calls if block.path in rows else ():
            settings = {key: list(getattr(block, key)) for key in ("kernel", "stride", "padding")}
            settings["dilation"] = [1] * len(block.kernel)
            found |= dict.fromkeys(call.nodes, Gone())
            found[unmarked(call.result)] = Merged(block.path, call.source, {**settings, "groups": block.groups})
    return found


def _epsilons(graph: Graph, rows: Rows) -> dict[fx.Node, Label]:
    found: dict[fx.Node, Label] = {}
    for norm in find_norms(graph, uncentred=True):
        if norm.path in rows:
            node = epsilon_node(norm)
            if node is None:
                raise Differs(norm.path, f"`{norm.path}` has no ε that could be another")
            found[node] = Epsilon(float((norm.module or {})["eps"]), float(rows[norm.path]["eps"]))
    return found


_LABELS: dict[str, Callable[[Graph, Rows], dict[fx.Node, Label]]] = {
    "replace": _replacements,
    # A norm inside a block that is merged is a part of it.
    "absorb": _absorptions,
    "clip": _clamps,
    "merge": _merges,
    "center": _insertions,
    "compress": _insertions,
    "epsilon": _epsilons,
    "renew": _renewals,
}
"""Module edit -> what labels the nodes that it changes; of two labels the later holds."""


def _new_biases(graph: Graph, rows: Rows) -> dict[fx.Node, str]:
    weights = {f"{path}.weight": f"{path}.{row['name']}" for path, row in rows.items()}
    return {
        user: weights[name]
        for node, parameter in graph.parameters.items()
        for name in parameter.aliases
        if name in weights
        for user in node.users
    }


def _made_of(graph: Graph, removed: set[str]) -> set[fx.Node]:
    """Values made of removed tensors alone."""
    found = {n for n, p in graph.parameters.items() if removed & set(p.aliases)}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(n in found for n in inputs):
            found.add(node)
    return found
