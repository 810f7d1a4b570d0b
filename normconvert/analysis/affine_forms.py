"""Following a module's operations with its input x in hand: what each value is as sum_i a_i * (W_i x) + b.

Such a *form* has taps: convolutions of the input, or the input itself. The a_i and b are vectors along the channels,
made of stored tensors alone (:class:`Vectors`). An affine norm is a form with one tap, the input itself; parallel
branches are one with several. What is not understood has no form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from normconvert.analysis.axis_rules import broadcast
from normconvert.analysis.channel_axes import is_float, shape_of
from normconvert.plan.vectors import Expression, minus, plus, times
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import ALIASES, BATCH_NORMS, CONVOLUTIONS, COPIES, GETITEM, name_of

SAME = COPIES | ALIASES
"""Operations that change no value."""

_RESHAPED = SAME | {"aten.view", "aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.flatten"}


@dataclass(frozen=True)
class Tap:
    """The input itself or, with a ``weight``, a convolution of it without bias; times ``scale``, by output channel."""

    scale: Expression = 1
    weight: str | None = None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 0
    outputs: int = 0


@dataclass(frozen=True)
class Form:
    """The sum of ``taps``, and ``shift``.

    Attributes:
        taps: what is added up; multiples of the input alone are one tap.
        shift: one number a channel.
        dim: the dimension that scales and shift lie along; None: they are the same for all channels so far.
        nodes: the operations that have made it.
    """

    taps: tuple[Tap, ...] = (Tap(),)
    shift: Expression = 0
    dim: int | None = None
    nodes: frozenset[fx.Node] = frozenset()

    @property
    def scale(self) -> Expression | None:
        """a, if the form is a * x + b."""
        return self.taps[0].scale if len(self.taps) == 1 and self.taps[0].weight is None else None


def forms_from(graph: Graph, source: fx.Node, nodes: list[fx.Node], vectors: Vectors) -> dict[fx.Node, Form]:
    """The forms among ``nodes`` of the value ``source``."""
    forms = {source: Form()}
    for node in nodes:
        if any(n in forms for n in node.all_input_nodes) and (form := _step(graph, node, forms, vectors)) is not None:
            forms[node] = replace(form, nodes=form.nodes | {node})
    return forms


def is_batch_norm(node: Any) -> bool:
    """Whether a node is a batch norm of some kind."""
    return name_of(node) in BATCH_NORMS


def _step(graph: Graph, node: fx.Node, forms: dict[fx.Node, Form], vectors: Vectors) -> Form | None:
    """The form of a node, if its operands' forms give one."""
    name = name_of(node)
    first, second = [*node.args, None, None][:2]
    left, right = (forms.get(a) if isinstance(a, fx.Node) else None for a in (first, second))
    if name in ("aten.mul", "aten.add", "aten.sub", "aten.div") and node.kwargs.get("alpha", 1) == 1:
        op = name.removeprefix("aten.")
        if left is not None and right is not None:
            # Of different shapes one is stretched, and the sum is not one of an input's elements with itself.
            return _joined(op, left, right) if shape_of(first) == shape_of(second) else None
        if left is not None:
            return _combined(op, left, vectors.along(second, node))
        # v / y is not affine in y, and in v - y the sign of the form would turn.
        return _combined(op, right, vectors.along(first, node)) if right is not None and op in ("add", "mul") else None
    if left is None:
        return None
    # This kind of batch norm returns statistics beside the normalised value, which is the first.
    if name == GETITEM and second == 0 and is_batch_norm(first):
        return left
    if is_batch_norm(node):
        return _normalised(node, left, vectors)
    if name in CONVOLUTIONS:
        return _convolved(graph, node, left)
    # is_float: a cast to integers rounds.
    return left if name in SAME and is_float(node) else None


def _joined(op: str, left: Form, right: Form) -> Form | None:
    """The sum or difference of two forms."""
    dims = {left.dim, right.dim} - {None}
    if op not in ("add", "sub") or len(dims) > 1:
        return None
    join = plus if op == "add" else minus
    if left.scale is not None and right.scale is not None:
        taps: tuple[Tap, ...] = (Tap(join(left.scale, right.scale)),)
    else:
        taps = left.taps + tuple(replace(t, scale=t.scale if op == "add" else ["neg", t.scale]) for t in right.taps)
    return Form(taps, join(left.shift, right.shift), next(iter(dims), None), left.nodes | right.nodes)


def _combined(op: str, form: Form, along: tuple[Expression, int | None] | None) -> Form | None:
    """A form and a vector, added or multiplied."""
    if along is None:
        return None
    vector, dim = along
    if op in ("mul", "div"):
        return _scaled(form, vector if op == "mul" else ["reciprocal", vector], 0, dim)
    shift = plus(form.shift, vector) if op == "add" else minus(form.shift, vector)
    return _scaled(replace(form, shift=shift), 1, 0, dim)


def _scaled(form: Form, scale: Expression, shift: Expression, dim: int | None) -> Form | None:
    """The form times ``scale``, plus ``shift``, if all lie along one dimension."""
    if dim is not None and form.dim is not None and dim != form.dim:
        return None
    taps = tuple(replace(t, scale=times(t.scale, scale)) for t in form.taps)
    return Form(taps, plus(times(form.shift, scale), shift), form.dim if dim is None else dim, form.nodes)


def _normalised(node: fx.Node, form: Form, vectors: Vectors) -> Form | None:
    """BN(x) = w (x - m) / sqrt(v + eps) + b with stored m and v; dimension 1 of the input."""
    args: list[Any] = list(node.args)
    frozen = name_of(node) == "aten._native_batch_norm_legit_no_training"
    # args[5] is true in training and where there are no running statistics: then those of the batch are used.
    if not frozen and (name_of(node) != "aten.batch_norm" or args[5] is not False):
        return None
    # Without weight and bias they are one and zero. One that is there but not stored may be anything.
    weight, bias = (default if a is None else vectors.stored(a) for a, default in zip(args[1:3], (1, 0), strict=True))
    mean, variance = vectors.stored(args[3]), vectors.stored(args[4])
    if weight is None or bias is None or mean is None or variance is None:
        return None
    scale = times(weight, ["rsqrt", ["add", variance, float(args[6] if frozen else args[7])]])
    return _scaled(form, scale, minus(bias, times(mean, scale)), 1)


def _convolved(graph: Graph, node: fx.Node, form: Form) -> Form | None:
    """A convolution of the input, with the weight and bias of a checkpoint."""
    # Of the input itself only: taps of taps are another kernel, and a shift would not reach into the zero padding.
    if form.taps != (Tap(),) or form.shift != 0:
        return None
    args: list[Any] = [*node.args, *[None] * 7]
    weight, bias, stride, padding, dilation, groups = args[1:7]
    count = len(shape_of(weight)) - 2
    # "same" pads one side more where the kernel is even, and without a batch the channels are dimension 0.
    if node.kwargs or isinstance(padding, str) or len(shape_of(node)) != count + 2:
        return None
    names = []
    for operand in (weight, bias):
        parameter = graph.parameters.get(operand) if isinstance(operand, fx.Node) else None
        # A computed weight has no name to read it by, and a tied one is needed elsewhere as it is.
        if operand is not None and (parameter is None or not parameter.stored or len(parameter.aliases) > 1):
            return None
        names.append(parameter.name if parameter is not None else None)

    def each(value: Any, default: int) -> tuple[int, ...]:
        values = [default] if value is None else value if isinstance(value, (list, tuple)) else [value]
        return tuple(int(v) for v in (list(values) * count)[:count])

    outputs, _, *kernel = (int(n) for n in shape_of(weight))
    settings = (each(stride, 1), each(padding, 0), each(dilation, 1), int(groups or 1))
    return Form((Tap(1, names[0], tuple(kernel), *settings, outputs),), names[1] or 0, 1, form.nodes)


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
        # A cast to integers rounds.
        if not is_float(node) or sum(n != 1 for n in shape) > 1:
            return None
        if node.op == "placeholder":
            parameter = self._graph.parameters.get(node)
            # What no checkpoint holds has no value when a plan is applied.
            return parameter.name if parameter is not None and parameter.stored else None
        if name_of(node) in _RESHAPED:
            return self.stored(node.args[0])
        name = name_of(node).removeprefix("aten.")
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
