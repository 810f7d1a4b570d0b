"""Which values of a traced call matter, and which tensors it reads.

A program computes more than it returns, and another call may go on with what this one drops: a flag that is a tensor
decides it, say. So what is made of the inputs counts as read by somebody, and a tensor of which only values are made
that never meet those counts as unread.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import Tensor, fx

from normconvert.tracing.operations import PARTS, SILENT, name_of, readers, reads


def live_values(nodes: Sequence[fx.Node], ways_out: Set[fx.Node], parameters: Set[fx.Node]) -> set[fx.Node]:
    """The nodes whose values matter: what an output is made of, what is asserted, and whatever is made of the inputs.

    Of what is only asked for its shape they do not, nor do values of tensors alone that nothing reads. A part that is
    taken of a value and dropped shows no more than the value: it is taken to be asked for its shape.

    Args:
        nodes: in execution order.
        ways_out: values that are returned by others than the program's own output: hidden states return what layers
            give, also those behind the last of which an output is made.
        parameters: the nodes of tensors of the model.
    """
    return _reaching(nodes, ways_out | _dropped(nodes, ways_out, parameters))


def dropped_values(nodes: Sequence[fx.Node], ways_out: Set[fx.Node], parameters: Set[fx.Node]) -> list[fx.Node]:
    """The floating values that nothing reads, made of the inputs and of tensors that serve nothing else.

    What a module gives beside what is read of it is none: the model has made it of what it goes on with. The arguments
    are those of :func:`live_values`.
    """
    returned = _reaching(nodes, ways_out, assertions=False)
    apart = _made_of(nodes, {node for node in parameters if not any(user in returned for user in readers(node))})
    ends = _dropped(nodes, ways_out, parameters) & apart
    return [node for node in nodes if node in ends and _is_floating(node)]


def read_tensors(nodes: Sequence[fx.Node], ways_out: Set[fx.Node], parameters: Set[fx.Node]) -> set[fx.Node]:
    """The tensors of which a call shows where they go; the arguments are those of :func:`live_values`.

    A mask token may be stretched for every call, and added where there is a mask: a value that nothing comes of, and
    that is made of tensors, indices and masks alone, shows as little as if there were no reader. Where it meets what
    the model has made of its inputs, it is a part of the model, such as a pooler.
    """
    returned = _reaching(nodes, ways_out, assertions=False)
    given, of_tensors = _made_of(nodes, _inputs(nodes, parameters)), _made_of(nodes, parameters)
    made = set[fx.Node]()  # what the model has made of its inputs
    for node in nodes:
        if node in given and node in of_tensors and node.op == "call_function":
            goes_on = node in returned and _is_floating(node)
            if goes_on or any(n in made for n in node.all_input_nodes if reads(node, n)):
                made.add(node)
    meeting = _reaching(nodes, ways_out | made, assertions=False)
    return {node for node in parameters if any(user in meeting for user in readers(node))}


def _dropped(nodes: Sequence[fx.Node], ways_out: Set[fx.Node], parameters: Set[fx.Node]) -> set[fx.Node]:
    """The values made of the inputs of which nothing is made but parts that are dropped as well."""
    given = _made_of(nodes, _inputs(nodes, parameters))
    parts, found = set[fx.Node](), set[fx.Node]()
    for node in reversed(nodes):
        if node.op == "call_function" and node not in ways_out and all(user in parts for user in node.users):
            (parts if name_of(node) in PARTS else found).add(node)
    return found & given


def _inputs(nodes: Sequence[fx.Node], parameters: Set[fx.Node]) -> set[fx.Node]:
    return {node for node in nodes if node.op == "placeholder" and node not in parameters}


def _made_of(nodes: Sequence[fx.Node], sources: Set[fx.Node]) -> set[fx.Node]:
    """The sources, and what looks at values that are made of them."""
    found = set(sources)
    for node in nodes:
        if any(n in found for n in node.all_input_nodes if reads(node, n)):
            found.add(node)
    return found


def _reaching(nodes: Sequence[fx.Node], ends: Set[fx.Node], *, assertions: bool = True) -> set[fx.Node]:
    """The nodes of which ends and the output are made, and assertions, which have no value."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        has_value = not assertions or isinstance(node.meta.get("val"), (Tensor, list, tuple))
        silent = node.op == "call_function" and has_value and not any(u in found for u in readers(node))
        if (node in ends or not silent) and name_of(node) not in SILENT:
            found.add(node)
    return found


def _is_floating(node: fx.Node) -> bool:
    """Whether a value is a floating tensor, or holds one."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, Tensor) and (one.is_floating_point() or one.is_complex()) for one in values)
