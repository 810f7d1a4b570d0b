"""Modules that return a form of their input, and those among them that are affine norms: y = a * x + b.

BatchNorm, frozen BatchNorm, RepBN (``BN(x) + eta * x``), Unified Normalization, PowerNorm: in eval mode all of them
multiply by one stored vector and add another, channel by channel. No class is looked for. A module is such a norm if
what it returns, before children that run last, is an affine form of its input whose coefficients are made of stored
tensors, a stored statistic (a buffer) among them. See `normconvert.analysis.affine_forms`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from normconvert.analysis.affine_forms import SAME, Form, Vectors, forms_from, is_batch_norm
from normconvert.analysis.channel_axes import ChannelAxis, shape_of
from normconvert.plan.vectors import Expression, names_in
from normconvert.runtime import Affine as AffineNorm
from normconvert.tracing.graph import Graph, home_of, module_path
from normconvert.tracing.in_place_writes import MARKER
from normconvert.tracing.operations import name_of, readers

LARGEST = 256
"""Operations, marks included, in the largest module that is looked at."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module that returns a form of its input.

    Attributes:
        source: the value it reads: the mark of the module's input.
        result: the form of it, before any activation that the module applies.
        form: what the result is of the source.
        keep: names of the module's children that run afterwards (its activation), in order.
    """

    source: fx.Node
    result: fx.Node
    form: Form
    keep: tuple[str, ...]

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """The operations between source and result, and the result."""
        return self.form.nodes

    @property
    def axis(self) -> ChannelAxis:
        """Where source and result carry the channels, if the form tells."""
        assert self.form.dim is not None
        return ChannelAxis(self.form.dim, int(shape_of(self.result)[self.form.dim]))

    @property
    def effect(self) -> tuple[Any, ...]:
        """What has to be the same in all calls of a module."""
        return self.form.taps, self.form.shift, self.keep

    def seen_halfway(self, graph: Graph) -> bool:
        """Whether anybody sees a step between source and result."""
        steps = self.nodes - {self.result}
        return any(n in graph.exits or any(u not in self.nodes for u in readers(n)) for n in steps)


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
    calls = calls_with_forms(graph, lambda nodes: any(n in statistics for node in nodes for n in node.all_input_nodes))
    found = {path: affine for path, group in calls.items() if (affine := _affine(graph, path, group)) is not None}
    found |= {a.path: a for a in _batch_statistics(graph, found)}
    # A norm that is one term of a larger one is no norm by itself.
    larger = [path for path, affine in found.items() if affine.calls]
    return [a for path, a in found.items() if not any(path.startswith(f"{other}.") for other in larger)]


def _is_buffer(graph: Graph, name: str) -> bool:
    """Whether a tensor is a statistic: a buffer, or what has become of one in a swapped norm."""
    owner, _, leaf = name.rpartition(".")
    module = graph.modules.get(owner)
    return module is not None and (leaf in module._buffers or isinstance(module, AffineNorm))


def calls_with_forms(graph: Graph, wanted: Callable[[list[fx.Node]], bool]) -> dict[str, list[Call]]:
    """Module -> its calls, in execution order, of the modules that in every call return a form of their input.

    Args:
        graph: the model's.
        wanted: asked of a module's operations, whether it is looked at.
    """
    inside: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        path = home_of(node)
        while node.op == "call_function" and path:
            inside[path].append(node)
            path = path.rpartition(".")[0]
    looked_at = {path for path, nodes in inside.items() if len(nodes) <= LARGEST and wanted(nodes)}
    vectors = Vectors(graph)
    calls: dict[str, list[Call | None]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is MARKER and node.args[2:4] == ("input", "0") and (path := str(node.args[1])) in looked_at:
            calls[path].append(_call(path, node, forms_from(graph, node, inside[path], vectors)))
    return {path: [c for c in group if c is not None] for path, group in calls.items() if None not in group}


def _call(path: str, source: fx.Node, forms: dict[fx.Node, Form]) -> Call | None:
    """One call of the module at ``path``, if what leaves its forms is one of them, and nothing but children follows."""
    last = [n for n, form in forms.items() if form.nodes and (_is_output(n, path) or _read_by_others(n, forms))]
    if len(last) != 1:
        return None
    (result,) = last
    keep = () if _is_output(result, path) else _children_after(result, path)
    own = [module_path(n) for n in forms[result].nodes if n.target is not MARKER]
    # A module that does nothing itself is a container of the norm or block. A child that is a part of it and runs again
    # behind it can neither go nor stay.
    if keep is None or path not in own or {_child(path, inner) for inner in own} & set(keep):
        return None
    return Call(source, result, forms[result], keep)


def _is_output(node: fx.Node, path: str) -> bool:
    return node.target is MARKER and node.args[1:4] == (path, "output", "")


def _read_by_others(node: fx.Node, forms: dict[fx.Node, Form]) -> bool:
    return any(u not in forms for u in readers(node))


def _child(path: str, inner: str) -> str | None:
    """The name of the child of the module at ``path`` that holds the module at ``inner``; None for others."""
    return inner.removeprefix(f"{path}.").partition(".")[0] if inner.startswith(f"{path}.") else None


def _children_after(result: fx.Node, path: str) -> tuple[str, ...] | None:
    """The children of a module that run after ``result``, in order; None if more than children runs there."""
    keep: dict[str, None] = {}
    seen, work = {result}, [result]
    while work:
        for user in readers(work.pop()):
            if user in seen or _is_output(user, path):
                continue
            seen.add(user)
            work.append(user)
            inner = home_of(user)
            if inner == path and name_of(user) in SAME:
                continue
            if (child := _child(path, inner)) is None:
                return None
            keep[child] = None
    return tuple(keep)


def _affine(graph: Graph, path: str, calls: list[Call]) -> Affine | None:
    """The norm at ``path``, if all calls of it are affine, and of statistics."""
    for form in (call.form for call in calls):
        # Without a statistic among them this is a layer scale or the like, and no norm that a user asks about.
        names = [] if form.scale is None or form.dim is None else [*names_in(form.scale), *names_in(form.shift)]
        if not any(_is_buffer(graph, name) for name in names):
            return None
    first = calls[0]
    obstacle = uses_outside(graph, path)
    if not obstacle and any(call.seen_halfway(graph) for call in calls):
        obstacle = "something reads it half-way"
    if any(call.effect != first.effect for call in calls):
        obstacle = "it is called in different ways"
    kind, code = type(graph.modules[path]).__name__, "not-a-module" if obstacle else ""
    return Affine(path, kind, tuple(calls), first.form.scale, first.form.shift, first.keep, obstacle, code)


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
        if not is_batch_norm(node) or path in found or path in rest:
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
            return True  # marks are put at data only
        work += at.all_input_nodes
    return False
