"""Values of a graph found by what they are made of, whatever the order in which that is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from normconvert.tracing.operations import ATTENTION, argument, name_of

Reads = Callable[[fx.Node], Any]
"""What an operand is: values that are one are the same object."""


class Expressions:
    """Values by the expressions that they are: what is computed twice is one value.

    Args:
        nodes: operations in the order in which they run.
        plain: a value without what makes no difference to it.
    """

    def __init__(self, nodes: Iterable[fx.Node], plain: Reads) -> None:
        self._first: dict[Any, fx.Node] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            self._same[node] = self._first.setdefault(_key(node, lambda x: self.value(plain(x))), node)

    def value(self, node: Any) -> Any:
        """The operation that computes a value first."""
        return self._same.get(node, node) if isinstance(node, fx.Node) else node

    def find(self, node: fx.Node, reads: Reads) -> fx.Node | None:
        """The value of the operation ``node`` of another graph, whose operands are what ``reads`` says."""
        return self._first.get(_key(node, reads))


def live(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The values that others are made of, and these."""
    found: set[fx.Node] = set()
    work = list(outputs)
    while work:
        node = work.pop()
        if node not in found:
            found.add(node)
            work += node.all_input_nodes
    return found


def _key(node: fx.Node, reads: Reads) -> Any:
    """An operation's target and arguments; equal for equal operations."""

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "value", id(reads(value))
        if isinstance(value, (list, tuple)):
            return tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((key, plain(one)) for key, one in sorted(value.items()))
        # As they are written: 1 is not True, and 0.0 not -0.0; a NaN is equal to nothing.
        return type(value), object() if value != value else repr(value)

    operands = [plain(value) for value in node.args]
    if name_of(node) in ("aten.add", "aten.mul") and not node.kwargs and len(operands) == 2:
        operands.sort(key=repr)  # a + b is b + a, to the last bit
    return object() if _draws(node) else node.target, tuple(operands), plain(dict(node.kwargs))


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers: twice, they are not the same."""
    if name_of(node) == ATTENTION and argument(node, 4, "dropout_p", 0.0) == 0.0:
        return False
    if name_of(node) == "aten.dropout" and argument(node, 2, "train") is False:
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
