"""Which values of a traced call matter, and which tensors it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from torch import Tensor, fx

from normconvert.tracing.operations import SILENT, name_of, readers, reads


def live_values(nodes: Iterable[fx.Node], ways_out: Set[fx.Node]) -> set[fx.Node]:
    """The nodes whose values matter: what an output or another way out is made of, and what is asserted.

    Of a tensor that is only asked for its shape they do not.

    Args:
        nodes: in execution order.
        ways_out: values that are returned by others than the program's own output: hidden states return what layers
            give, also those behind the last of which an output is made.
    """
    found: set[fx.Node] = set()
    for node in reversed(tuple(nodes)):
        has_value = isinstance(node.meta.get("val"), (Tensor, list, tuple))  # an assertion has none, and matters
        silent = node.op == "call_function" and has_value and not any(u in found for u in readers(node))
        if node in ways_out or (not silent and name_of(node) not in SILENT):
            found.add(node)
    return found


def read_tensors(nodes: Sequence[fx.Node], ways_out: Set[fx.Node], parameters: Set[fx.Node]) -> set[fx.Node]:
    """The tensors of which a call shows where they go.

    A program computes more than it returns. A mask token may be stretched for every call, and added where there is a
    mask: a value that nothing comes of, and that is made of tensors and indices alone, shows as little as if there were
    no reader. Where it meets what the model makes of its inputs, it is a part of the model, such as a pooler.

    Args:
        nodes: in execution order.
        ways_out: as for :func:`live_values`.
        parameters: the nodes of tensors of the model.
    """
    live = live_values(nodes, ways_out)
    given, made = set[fx.Node](), set[fx.Node]()  # made of inputs; numbers among these that the model goes on with
    for node in nodes:
        operands = [n for n in node.all_input_nodes if reads(node, n)]
        if (node.op == "placeholder" and node not in parameters) or any(n in given for n in operands):
            given.add(node)
            value = node.meta.get("val")
            floating = not isinstance(value, Tensor) or value.is_floating_point()
            if any(n in made for n in operands) or (floating and node in live):
                made.add(node)
    meeting = live_values(nodes, ways_out | made)
    return {node for node in parameters if any(user in meeting for user in readers(node))}
