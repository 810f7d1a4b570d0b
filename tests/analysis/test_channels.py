"""The op table against torch itself: whatever a rule says passes along the channels does.

A rule claims that its operation is a sum of products. So for any linear map B along the channels: applied to one
operand of each product, with the others the same in all channels, it must come out as B applied to the result, but for
the products that no operand's channels reach.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from normconvert.analysis.channel_axes import ChannelAxis, NoPlace, Operand, carry_back, carry_forward, shape_of
from normconvert.analysis.op_table import TABLE, terms_of
from normconvert.tracing.operations import name_of
from tests.support.op_examples import EXAMPLES, Example

Values = dict[fx.Node, Any]
NO_OPERAND = {"aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.full", "aten.full_like", "aten.new_full"}
"""Operations whose result is the same in all channels."""
NOT_TORCH = {"aten.float", "aten.half"}
"""Rules for names that are no operations of torch (``x.float()`` is ``aten.to``)."""


def build(example: Example) -> tuple[fx.Node, Values]:
    """The call as a node of a graph, and the values of its tensor arguments."""
    graph = fx.Graph()
    values: Values = {}

    def placeholder(tensor: Tensor) -> fx.Node:
        node = graph.placeholder(f"x{len(values)}")
        node.meta["val"] = values[node] = tensor
        return node

    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, placeholder, (example.args, example.kwargs))
    node = graph.call_function(example.target, args, kwargs)
    node.meta["val"] = compute(node, values)
    if example.part is not None:
        parts, node = node, graph.call_function(operator.getitem, (node, example.part))
        values = {parts: parts.meta["val"]}
        node.meta["val"] = compute(node, values)
    return node, values


def compute(node: fx.Node, values: Values) -> Any:
    """The result of the call on other values of its tensor arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def parts_of(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def along(value: Any, place: ChannelAxis, change: Any) -> Any:
    """``change`` applied to the channels of a tensor, brought to its last axis, or to those of each part."""
    if isinstance(value, (tuple, list)):
        return tuple(along(part, place, change) for part in value)
    shape = value.shape
    outer = shape[place.dim] // (place.size * place.inner)
    view = value.reshape(*shape[: place.dim], outer, place.size, place.inner, *shape[place.dim + 1 :])
    return (
        change(view.movedim(place.dim + 1, -1))
        .movedim(-1, place.dim + 1)
        .reshape(shape)
        .clone(memory_format=torch.contiguous_format)
    )


def flattened(value: Any, place: ChannelAxis) -> Any:
    """The same value in all channels: the first channel's."""
    return along(value, place, lambda x: x[..., :1].expand(x.shape))


def places(shape: tuple[int, ...]) -> Iterator[ChannelAxis]:
    """Every factor of every dimension."""
    for dim, count in enumerate(shape):
        for outer, size in itertools.product(range(1, count + 1), range(2, count + 1)):
            if count % (outer * size) == 0:
                yield ChannelAxis(dim, size, outer, count // (outer * size))


def places_to_test(node: fx.Node, terms: tuple[tuple[Operand, ...], ...]) -> set[ChannelAxis]:
    """Places of the result that some operand's channels arrive at, or that some operand is asked for."""
    operands = list(itertools.chain(*terms))
    found = {place for place in places(shape_of(node)) if any(_is_carried(o, place, node) for o in operands)}
    for operand in itertools.chain(*terms):
        for place in places(shape_of(operand.node)):
            at = carry_forward(operand, place, node)
            if at is not None:
                assert at.dim < len(shape_of(node)), f"{place} of {operand} arrives at a dimension that is not there"
                assert at.outer * at.size * at.inner == shape_of(node)[at.dim], f"{place} of {operand} arrives at {at}"
                found.add(at)
    return found


def _is_carried(operand: Operand, place: ChannelAxis, node: fx.Node) -> bool:
    return isinstance(carry_back(operand, place, node), ChannelAxis)


def holds(
    node: fx.Node, values: Values, terms: tuple[tuple[Operand, ...], ...], place: ChannelAxis, choice: int
) -> bool:
    """Whether the claim of a rule at one place of the result is true; ``choice`` of the factors varies by channel."""
    values = dict(values)
    kept: dict[fx.Node, ChannelAxis] = {}
    constant = False
    for term in terms:
        carriers = [(o, at) for o in term if isinstance(at := carry_back(o, place, node), ChannelAxis)]
        linear = [(o, at) for o, at in carriers if o.linear]
        chosen = linear[min(choice, len(linear) - 1)] if linear else None
        for operand, at in carriers:
            if chosen is None or operand is not chosen[0]:
                values[operand.node] = flattened(values[operand.node], at)
        if chosen is None:
            constant = True
        else:
            kept[chosen[0].node] = chosen[1]
    if not kept:
        return True  # nothing is claimed but that it cannot be followed
    if any(at.size != place.size for at in kept.values()):
        return False
    matrix = torch.randn(place.size, place.size, dtype=torch.float64)
    before = parts_of(_double(compute(node, values)))
    for key, at in kept.items():
        values[key] = along(values[key], at, partial(_mixed, matrix))
    after = parts_of(_double(compute(node, values)))
    for key in kept:
        values[key] = torch.utils._pytree.tree_map_only(Tensor, torch.zeros_like, values[key])
    rest = parts_of(
        _double(compute(node, values))
    )  # what no chosen factor accounts for: nothing, if all terms have one
    if not constant and any(part.count_nonzero() for part in rest):
        return False
    tolerance = 1e-5 if _is_reduced(node.meta["val"]) else 1e-10
    return all(
        torch.allclose(a - c, along(b - c, place, lambda x: x @ matrix.T), rtol=0, atol=tolerance)
        for a, b, c in zip(after, before, rest, strict=True)
    )


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    """Some operations take float32 alone; what is no float cannot hold a mixture."""
    mixed = x.to(matrix.dtype) @ matrix.T
    return mixed.to(x.dtype) if x.is_floating_point() else mixed


def _is_reduced(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _double(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.double, value)


def cases() -> list[Any]:
    found = [(name, i, e) for name, examples in EXAMPLES.items() for i, e in enumerate(examples)]
    return [pytest.param(name, example, id=f"{name.removeprefix('aten.')}-{i}") for name, i, example in found]


@pytest.mark.parametrize(("name", "example"), cases())
def test_what_a_rule_claims_is_true(name: str, example: Example) -> None:
    node, values = build(example)
    assert name_of(node) == name
    terms = terms_of(node)
    if terms is None:
        return
    if not terms:
        assert not bool(torch.as_tensor(node.meta["val"]).count_nonzero())
    for place in places_to_test(node, terms):
        for choice in range(max((len(term) for term in terms), default=1)):
            assert holds(node, values, terms, place, choice), f"{terms} is wrong at {place} of {shape_of(node)}"


@pytest.mark.parametrize(("name", "example"), cases())
def test_what_is_called_constant_is_the_same_for_all_channels(name: str, example: Example) -> None:
    node, _ = build(example)
    operands = list(itertools.chain(*(terms_of(node) or ())))
    for place in places(shape_of(node)) if operands else ():
        if all(carry_back(operand, place, node) is NoPlace.CONSTANT for operand in operands):
            for part in parts_of(node.meta["val"]):
                assert torch.equal(part, flattened(part, place)), f"{place} of {shape_of(node)}"


@pytest.mark.parametrize(("name", "example"), cases())
def test_a_rule_mentions_every_operand_that_matters(name: str, example: Example) -> None:
    node, values = build(example)
    terms = terms_of(node)
    mentioned = {operand.node for term in terms or () for operand in term}
    for argument, value in values.items():
        if terms is None or argument in mentioned or not (isinstance(value, Tensor) and value.is_floating_point()):
            continue
        if value.ndim == 0:
            continue  # a number
        changed = compute(node, {**values, argument: torch.randn_like(value)})
        assert all(torch.equal(a, b) for a, b in zip(parts_of(changed), parts_of(node.meta["val"]), strict=True))


@pytest.mark.parametrize("name", TABLE)
def test_every_rule_has_an_example_that_shows_it(name: str) -> None:
    if name in NOT_TORCH:
        return
    shown = 0
    for example in EXAMPLES[name]:
        node, _ = build(example)
        terms = terms_of(node)
        shown += len(places_to_test(node, terms)) if terms else terms is not None
    assert shown or name in NO_OPERAND


@pytest.mark.parametrize("name", sorted(NO_OPERAND))
def test_constants_are_the_same_in_all_channels(name: str) -> None:
    for example in EXAMPLES[name]:
        node, _ = build(example)
        assert terms_of(node) in ((), ((),))
        assert node.meta["val"].unique().numel() == 1


def test_a_wrong_rule_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests: a rule that lets every dimension pass is found out."""

    def everything(node: fx.Node) -> tuple[tuple[Operand, ...], ...]:
        arguments = [a for a in node.all_input_nodes if len(shape_of(a)) == len(shape_of(node))]
        return tuple((Operand(a, {d: d for d in range(len(shape_of(a)))}),) for a in arguments)

    for name in ("mul", "where", "roll", "matmul", "linear", "gather", "flip", "conv2d"):
        name = f"aten.{name}"
        monkeypatch.setitem(TABLE, name, everything)
        found = False
        for example in EXAMPLES[name]:
            try:
                test_what_a_rule_claims_is_true(name, example)
                test_a_rule_mentions_every_operand_that_matters(name, example)
            except (AssertionError, RuntimeError):
                found = True
        assert found, name
