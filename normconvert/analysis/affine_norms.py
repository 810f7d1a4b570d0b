"""Finding the norms that are affine maps at inference: y = a * x + b, channel by channel.

BatchNorm, frozen BatchNorm, RepBN (``BN(x) + eta * x``), Unified Normalization, PowerNorm: in eval mode all of them
multiply by one stored vector and add another. No class is looked for. A module is such a norm if what it returns is an
affine form of its input whose coefficients are made of stored tensors, a stored statistic (a buffer) among them; the
form is found by following the module's operations with (a, b) in hand.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from normconvert.analysis.affine_forms import SAME, Form, Vectors, forms_from
from normconvert.analysis.channel_axes import Place
from normconvert.analysis.operations import NEUTRAL, name_of
from normconvert.plan.vectors import Expression, names_in
from normconvert.runtime import Affine as AffineNorm
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARKER


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an affine norm.

    Attributes:
        source: the value it reads: the marker of the module's input.
        result: the affine form of it, before any activation that the module applies.
        place: where both carry the channels.
        nodes: the operations in between.
    """

    source: fx.Node
    result: fx.Node
    place: Place
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class Affine:
    """A module that is an affine norm.

    Attributes:
        path: its path.
        kind: its class.
        calls: in execution order.
        scale: a, the same for all calls.
        shift: b.
        keep: names of its children that still run afterwards (its activation), in order.
        obstacle: why it cannot be taken away, if it cannot.
        code: the class of that reason.
    """

    path: str
    kind: str
    calls: tuple[Call, ...]
    scale: Expression
    shift: Expression
    keep: tuple[str, ...] = ()
    obstacle: str = ""
    code: str = ""


def find_affine_norms(graph: Graph) -> list[Affine]:
    """All modules that are affine norms, in execution order.

    A norm that uses the batch's own statistics is among them with an obstacle, since a user expects a word about it.
    """
    statistics = {n for n, p in graph.parameters.items() if p.stored and _is_buffer(graph, p.name)}
    vectors = Vectors(graph)
    calls: dict[str, list[tuple[fx.Node, dict[fx.Node, Form]]]] = defaultdict(list)
    inside = _nodes_by_module(graph)
    for node in graph.nodes:
        if node.target is MARKER and node.args[2:4] == ("input", "0"):
            path = str(node.args[1])
            if _may_be_norm(inside.get(path, ()), graph, statistics):
                calls[path].append((node, forms_from(node, inside[path], vectors)))
    found = {path: affine for path, group in calls.items() if (affine := _affine(graph, path, group)) is not None}
    found |= {a.path: a for a in _batch_statistics(graph, found)}
    return [affine for path, affine in found.items() if not _is_part(path, found)]


def _is_buffer(graph: Graph, name: str) -> bool:
    """Whether a tensor is a statistic: a buffer, or what has become of one in a swapped norm."""
    owner, _, leaf = name.rpartition(".")
    module = graph.modules.get(owner)
    return module is not None and (leaf in module._buffers or isinstance(module, AffineNorm))


def _nodes_by_module(graph: Graph) -> dict[str, list[fx.Node]]:
    """The operations of each module, those of its children included, in execution order."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function":
            # A marker belongs to the module whose boundary it marks.
            path = str(node.args[1]) if node.target is MARKER else module_path(node)
            while path:
                found[path].append(node)
                path = path.rpartition(".")[0]
    return found


LARGEST = 64
"""Operations in the largest module that is looked at: a norm is small."""


def _may_be_norm(nodes: Any, graph: Graph, statistics: set[fx.Node]) -> bool:
    return len(nodes) <= LARGEST * 4 and any(n in statistics for node in nodes for n in node.all_input_nodes)


def _affine(graph: Graph, path: str, group: list[tuple[fx.Node, dict[fx.Node, Form]]]) -> Affine | None:
    """The norm at ``path``, if every call of it ends in the same affine form of its input."""
    calls: list[Call] = []
    forms: list[Form] = []
    keeps: list[tuple[str, ...]] = []
    for source, known in group:
        found = _result(graph, path, known)
        if found is None:
            return None
        result, keep = found
        form = known[result]
        # Without a statistic among them this is a layer scale or the like, and no norm that a user asks about.
        if form.dim is None or not any(_is_buffer(graph, n) for n in (*names_in(form.scale), *names_in(form.shift))):
            return None
        if not any(module_path(n) == path and n.target is not MARKER for n in form.nodes):
            return None  # a container that does nothing itself: the norm is one of its children
        calls.append(Call(source, result, Place(form.dim, form.size), form.nodes))
        forms.append(form)
        keeps.append(keep)
    first = forms[0]
    obstacle, code = _obstacle(graph, path, calls)
    if any((f.scale, f.shift) != (first.scale, first.shift) for f in forms) or len(set(keeps)) > 1:
        obstacle, code = "it is called in different ways", "not-a-module"
    kind = type(graph.modules[path]).__name__
    return Affine(path, kind, tuple(calls), first.scale, first.shift, keeps[0], obstacle, code)


def _result(graph: Graph, path: str, forms: dict[fx.Node, Form]) -> tuple[fx.Node, tuple[str, ...]] | None:
    """The last affine value of a call and the children that run after it; None if more than children runs there."""
    last = [n for n in forms if forms[n].nodes and _leaves(n, path, forms)]
    if len(last) != 1:
        return None
    result = last[0]
    if result.target is MARKER and result.args[1:4] == (path, "output", ""):
        return result, ()
    keep = children_after(result, path)
    own = {
        module_path(n).removeprefix(f"{path}.").partition(".")[0] for n in forms[result].nodes if n.target is not MARKER
    }
    # A child that is a part of the norm and runs again behind it can neither go nor stay.
    return None if keep is None or own & set(keep) else (result, keep)


def children_after(result: fx.Node, path: str) -> tuple[str, ...] | None:
    """The children of a module that run after ``result``, in order; None if more than children runs there."""
    keep: dict[str, None] = {}
    seen, work = {result}, [result]
    while work:
        for user in work.pop().users:
            if user in seen or name_of(user) in NEUTRAL:
                continue
            seen.add(user)
            if user.target is MARKER and user.args[1:4] == (path, "output", ""):
                continue
            inner = module_path(user) if user.target is not MARKER else str(user.args[1])
            if inner == path and name_of(user) in SAME:
                work.append(user)
                continue
            if not inner.startswith(f"{path}."):
                return None
            keep[inner.removeprefix(f"{path}.").partition(".")[0]] = None
            work.append(user)
    return tuple(keep)


def _leaves(node: fx.Node, path: str, forms: dict[fx.Node, Form]) -> bool:
    """Whether an affine value is read by what is not one, or is the module's output."""
    if node.target is MARKER and node.args[1:4] == (path, "output", ""):
        return True
    return any(u not in forms and name_of(u) not in NEUTRAL for u in node.users)


def _obstacle(graph: Graph, path: str, calls: list[Call]) -> tuple[str, str]:
    """Who uses the module in another way than by calling it; empty if nobody does."""
    if outside := uses_outside(graph, path):
        return outside, "not-a-module"
    for call in calls:
        # Only the result is given a place elsewhere; who reads a step in between would miss it.
        leaving = [u for n in call.nodes - {call.result} for u in n.users if u not in call.nodes]
        if any(name_of(u) not in NEUTRAL for u in leaving):
            return "something reads it half-way", "not-a-module"
    return "", ""


def uses_outside(graph: Graph, path: str) -> str:
    """Who reads the module's tensors from outside; empty if nobody does."""
    prefix = f"{path}."
    for node, parameter in graph.parameters.items():
        if any(alias.startswith(prefix) for alias in parameter.aliases):
            outside = _reader_outside(node, path)
            if outside is not None:
                return f"`{module_path(outside) or 'the model'}` uses `{parameter.name}` as well"
    return ""


def _reader_outside(node: fx.Node, path: str) -> fx.Node | None:
    for user in node.users:
        inner = module_path(user)
        if user.op == "output" or not (inner == path or inner.startswith(f"{path}.")):
            return user
    return None


def _batch_statistics(graph: Graph, found: dict[str, Affine]) -> list[Affine]:
    """Batch norms that are not affine at inference: they use the batch's own statistics."""
    rest: dict[str, Affine] = {}
    for node in graph.nodes:
        path = module_path(node)
        if node.op != "call_function" or "batch_norm" not in name_of(node) or path in found or path in rest:
            continue
        if not any(i not in graph.parameters and i.op != "placeholder" for i in node.all_input_nodes[:1]):
            continue  # of a weight, as weight standardisation does: no norm of the model's values
        if not _reads_data(node.args[0]):
            continue
        module = graph.modules.get(path)
        trained = name_of(node) != "aten.batch_norm" or node.args[5] is False
        why = "it has no module of its own" if trained else "it has no running statistics: it uses those of the batch"
        code = "not-a-module" if trained else "batch-statistics"
        rest[path] = Affine(path, type(module).__name__, (), 1, 0, (), why, code)
    return list(rest.values())


def _reads_data(node: Any) -> bool:
    """Whether a value depends on the model's inputs: reached back from it, there is one that is no parameter."""
    seen, work = set(), [node]
    while work:
        at = work.pop()
        if at in seen or not isinstance(at, fx.Node):
            continue
        seen.add(at)
        if at.target is MARKER:
            return True  # markers are put at data only
        work += at.all_input_nodes
    return False


def _is_part(path: str, found: dict[str, Affine]) -> bool:
    """Whether the module is one term of a larger affine norm that holds it."""
    return any(path.startswith(f"{p}.") and a.calls for p, a in found.items())
