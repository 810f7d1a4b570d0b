"""Following a * x + b through a module's operations: the affine form of each value that has one, as expressions.

The coefficients are made of stored tensors alone (:class:`Vectors`). What is not understood has no form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from normconvert.analysis.axis_rules import broadcast
from normconvert.analysis.channel_axes import is_float, shape_of
from normconvert.analysis.operations import name_of
from normconvert.plan.vectors import Expression, minus, plus, times
from normconvert.tracing.graph import Graph

SAME = {
    "normconvert.boundary",
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.contiguous",
    "aten.clone",
    "aten.detach",
}
"""Operations that change no value."""


@dataclass(frozen=True)
class Form:
    """a * x + b of the module's input x, along dimension ``dim`` (None: the same for all channels so far)."""

    scale: Expression
    shift: Expression
    dim: int | None
    size: int
    nodes: frozenset[fx.Node]


def forms_from(source: fx.Node, nodes: list[fx.Node], vectors: Vectors) -> dict[fx.Node, Form]:
    """The affine forms of one call of the module, from the marker of its input on."""
    forms = {source: Form(1, 0, None, 1, frozenset())}
    for node in nodes:
        if any(n in forms for n in node.all_input_nodes) and (form := _step(node, forms, vectors)) is not None:
            forms[node] = form
    return forms


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
        if name in ("view", "reshape", "unsqueeze", "squeeze", "flatten", "_to_copy", "to", "detach", "clone"):
            return self.stored(node.args[0]) if is_float(node.args[0]) and is_float(node) else None  # type: ignore[arg-type]
        if name_of(node) == "normconvert.boundary" or name == "type_as":
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
