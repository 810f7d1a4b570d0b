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

from torch import Tensor, fx

from normconvert.analysis.axis_rules import broadcast
from normconvert.analysis.channel_axes import Place, is_float, shape_of
from normconvert.analysis.op_table import NEUTRAL, name_of
from normconvert.plan.vectors import Expression, minus, names_in, plus, times
from normconvert.runtime import Affine as AffineNorm
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARK


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an affine norm.

    Attributes:
        source: the value it reads: the mark of the module's input.
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


@dataclass(frozen=True)
class Form:
    """a * x + b of the module's input x, along dimension ``dim`` (None: the same for all channels so far)."""

    scale: Expression
    shift: Expression
    dim: int | None
    size: int
    nodes: frozenset[fx.Node]


def find_affine_norms(graph: Graph) -> list[Affine]:
    """All modules that are affine norms, in execution order.

    A norm that uses the batch's own statistics is among them with an obstacle, since a user expects a word about it.
    """
    statistics = {n for n, p in graph.parameters.items() if p.stored and _is_buffer(graph, p.name)}
    vectors = Vectors(graph)
    calls: dict[str, list[tuple[fx.Node, dict[fx.Node, Form]]]] = defaultdict(list)
    inside = _nodes_by_module(graph)
    for node in graph.nodes:
        if node.target is MARK and node.args[2:4] == ("input", "0"):
            path = str(node.args[1])
            if _may_be_norm(inside.get(path, ()), graph, statistics):
                calls[path].append((node, _forms(node, path, inside[path], vectors)))
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
            # A mark belongs to the module whose boundary it marks.
            path = str(node.args[1]) if node.target is MARK else module_path(node)
            while path:
                found[path].append(node)
                path = path.rpartition(".")[0]
    return found


LARGEST = 64
"""Operations in the largest module that is looked at: a norm is small."""


def _may_be_norm(nodes: Any, graph: Graph, statistics: set[fx.Node]) -> bool:
    return len(nodes) <= LARGEST * 4 and any(n in statistics for node in nodes for n in node.all_input_nodes)


def _forms(source: fx.Node, path: str, nodes: list[fx.Node], vectors: Vectors) -> dict[fx.Node, Form]:
    """The affine forms of one call of the module, from the mark of its input on."""
    forms = {source: Form(1, 0, None, 1, frozenset())}
    for node in nodes:
        if any(n in forms for n in node.all_input_nodes) and (form := _step(node, forms, vectors)) is not None:
            forms[node] = form
    return forms


SAME = {"normconvert.mark", "aten.to", "aten._to_copy", "aten.type_as", "aten.contiguous", "aten.clone", "aten.detach"}


def _step(node: fx.Node, forms: dict[fx.Node, Form], vectors: Vectors) -> Form | None:
    """The form of a node, if its operands' forms give one."""
    name = name_of(node)
    first = node.args[0] if node.args else None
    # is_float: a cast to integers rounds.
    if name in SAME and isinstance(first, fx.Node) and first in forms and is_float(node):
        return _with(forms[first], node)
    if "batch_norm" in name and first in forms:
        return normalise(node, forms[first], vectors)  # type: ignore[index]
    # This kind of batch norm returns statistics beside the normalised value, which is the first.
    if "getitem" in name and first in forms and node.args[1] == 0 and "batch_norm" in name_of(first):  # type: ignore[arg-type]
        return _with(forms[first], node)  # type: ignore[index]
    if name in ("aten.mul", "aten.add", "aten.sub", "aten.div") and node.kwargs.get("alpha", 1) == 1:
        return _arithmetic(name.removeprefix("aten."), node, forms, vectors)
    return None


def _with(form: Form, node: fx.Node) -> Form:
    return Form(form.scale, form.shift, form.dim, form.size, form.nodes | {node})


def normalise(node: fx.Node, form: Form, vectors: Vectors) -> Form | None:
    """BN(x) = w (x - m) / sqrt(v + eps) + b with stored m and v; dimension 1 of the input."""
    args = list(node.args)
    frozen = name_of(node) == "aten._native_batch_norm_legit_no_training"
    # args[5] is true in training and where there are no running statistics: then those of the batch are used.
    if not frozen and (name_of(node) != "aten.batch_norm" or args[5] is not False):
        return None
    weight, bias, mean, variance = (vectors.stored(a) if a is not None else None for a in args[1:5])
    eps = args[6] if frozen else args[7]
    # An operand that is there but not stored may be anything, which None would hide.
    missing = [a for a, v in zip(args[1:5], (weight, bias, mean, variance), strict=True) if a is not None and v is None]
    if missing or mean is None or variance is None or form.dim not in (None, 1) or form.shift != 0 or form.scale != 1:
        return None
    scale = times(1 if weight is None else weight, ["rsqrt", ["add", variance, float(eps)]])  # type: ignore[arg-type]
    shift = minus(0 if bias is None else bias, times(mean, scale))
    return Form(scale, shift, 1, int(shape_of(args[0])[1]), form.nodes | {node})


def is_data_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm of some kind."""
    return node.op == "call_function" and "batch_norm" in name_of(node)


def _arithmetic(op: str, node: fx.Node, forms: dict[fx.Node, Form], vectors: Vectors) -> Form | None:
    a, b = node.args[:2]
    left = forms.get(a) if isinstance(a, fx.Node) else None
    right = forms.get(b) if isinstance(b, fx.Node) else None
    if left is not None and right is not None:
        if op not in ("add", "sub") or (left.dim is not None and right.dim is not None and left.dim != right.dim):
            return None
        # Then one is stretched, and the sum is not one of an input's elements with itself.
        if shape_of(a) != shape_of(b):
            return None
        join = plus if op == "add" else minus
        dim, size = (left.dim, left.size) if left.dim is not None else (right.dim, right.size)
        nodes = left.nodes | right.nodes | {node}
        return Form(join(left.scale, right.scale), join(left.shift, right.shift), dim, size, nodes)
    form, other = (left, b) if left is not None else (right, a)
    # v / y is not affine in y, and in v - y the sign of the form would turn.
    if form is None or (left is None and op in ("div", "sub")):
        return None
    along = vectors.along(other, node)
    if along is None:
        return None
    vector, dim = along
    if dim is not None and form.dim is not None and dim != form.dim:
        return None
    size = form.size if dim is None else int(shape_of(node)[dim])
    dim = form.dim if dim is None else dim
    nodes = form.nodes | {node}
    if op == "add":
        return Form(form.scale, plus(form.shift, vector), dim, size, nodes)
    if op == "sub":
        return Form(form.scale, minus(form.shift, vector), dim, size, nodes)
    factor = vector if op == "mul" else ["reciprocal", vector]
    return Form(times(form.scale, factor), times(form.shift, factor), dim, size, nodes)


class Vectors:
    """Values made of stored tensors alone, as expressions."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[fx.Node, Expression | None] = {}

    def stored(self, node: Any) -> Expression | None:
        """The expression of a value with at most one dimension longer than one; None if it has none."""
        if isinstance(node, (int, float)):
            return node
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            self._known[node] = self._expression(node)
        return self._known[node]

    def _expression(self, node: fx.Node) -> Expression | None:
        shape = shape_of(node)
        if not isinstance(node.meta.get("val"), Tensor) or sum(n != 1 for n in shape) > 1:
            return None
        if node.op == "placeholder":
            parameter = self._graph.parameters.get(node)
            # What no checkpoint holds has no value when a plan is applied.
            return parameter.name if parameter is not None and parameter.stored and is_float(node) else None
        name = name_of(node).removeprefix("aten.")
        if name in ("view", "reshape", "unsqueeze", "squeeze", "flatten", "_to_copy", "to", "detach", "clone", "mark"):
            return self.stored(node.args[0]) if is_float(node.args[0]) and is_float(node) else None  # type: ignore[arg-type]
        if name_of(node) == "normconvert.mark" or name == "type_as":
            return self.stored(node.args[0])
        operands = [self.stored(a) for a in node.args]
        if name in ("add", "sub", "mul", "div") and node.kwargs.get("alpha", 1) == 1 and len(operands) == 2:
            sizes = {max(shape_of(a), default=1) for a in node.args if isinstance(a, fx.Node)} - {1}
            return [name, *operands] if None not in operands and len(sizes) <= 1 else None
        if name in ("neg", "sqrt", "rsqrt", "reciprocal") and operands and operands[0] is not None:
            return [name, operands[0]]
        if name == "pow" and operands[0] is not None and node.args[1] == 2:
            return ["mul", operands[0], operands[0]]
        if name == "pow" and operands[0] is not None and node.args[1] == -0.5:
            return ["rsqrt", operands[0]]
        return None

    def along(self, value: Any, result: fx.Node) -> tuple[Expression, int | None] | None:
        """The expression, and the dimension of ``result`` that it lies along (None: one number for all)."""
        expression = self.stored(value)
        if expression is None:
            return None
        if not isinstance(value, fx.Node):
            return expression, None
        shape, new = shape_of(value), shape_of(result)
        long = [d for d, n in enumerate(shape) if n != 1]
        if not long:
            return None if new == () else (expression, None)
        target = broadcast(value, result).get(long[0])
        return None if target is None else (expression, target)


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
        if not any(module_path(n) == path and n.target is not MARK for n in form.nodes):
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
    if result.target is MARK and result.args[1:4] == (path, "output", ""):
        return result, ()
    keep = children_after(result, path)
    own = {
        module_path(n).removeprefix(f"{path}.").partition(".")[0] for n in forms[result].nodes if n.target is not MARK
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
            if user.target is MARK and user.args[1:4] == (path, "output", ""):
                continue
            inner = module_path(user) if user.target is not MARK else str(user.args[1])
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
    if node.target is MARK and node.args[1:4] == (path, "output", ""):
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
        if at.target is MARK:
            return True  # marks are put at data only
        work += at.all_input_nodes
    return False


def _is_part(path: str, found: dict[str, Affine]) -> bool:
    """Whether the module is one term of a larger affine norm that holds it."""
    return any(path.startswith(f"{p}.") and a.calls for p, a in found.items())
