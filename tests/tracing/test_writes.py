"""Boundary markers: they stay where they tell the truth, and go where they would hide a write in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normconvert.tracing.graph import Graph, trace
from normconvert.tracing.in_place_writes import MARKER, make_functional, mutates
from normconvert.tracing.probes.asking import call_fake


class Branch(nn.Module):
    """A linear map, and what joins its result and its input."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.map, self.join = nn.Linear(4, 4), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.map(x), x)


class Model(nn.Module):
    """What the branch reads is read again after it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(4, 4), Branch(join)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cat([self.branch(y), y], -1)


def marked(join: Callable[[Tensor, Tensor], Tensor]) -> set[tuple[str, str]]:
    with torch.device("meta"):
        model = Model(join).eval()
    graph: Graph = trace(model, {"x": torch.empty(2, 4, device="meta")})
    return {(str(n.args[1]), str(n.args[2])) for n in graph.nodes if n.target is MARKER}


@pytest.mark.parametrize(
    "join",
    [
        lambda out, x: out.add_(x),
        lambda out, x: out.mul_(x).relu_(),
        lambda out, x: out.addcmul_(x, x),
        lambda out, x: torch.add(out, x, out=torch.empty_like(out)),
        lambda out, x: out.copy_(x),
    ],
    ids=["add", "mul", "addcmul", "out", "copy"],
)
def test_what_a_write_reads_is_no_name_of_what_it_writes(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert marked(join) == {("branch", "input"), ("branch", "output")}


@pytest.mark.parametrize(
    "join",
    [
        lambda out, x: x.add_(out),
        lambda out, x: x.view(-1, 2, 2).add_(1.0).view(-1, 4) + out,
        lambda out, x: x.to(x.dtype).add_(out),
        lambda out, x: x.chunk(2, -1)[0].mul_(2.0) + out[..., :2],
        lambda out, x: torch.meshgrid(x[0], x[1], indexing="ij")[0].add_(0.0).sum() + out,
        lambda out, x: F.dropout(x, 0.1, False).add_(out),
        lambda out, x: F.dropout1d(x, 0.1, False).add_(out),
        lambda out, x: F.alpha_dropout(x, 0.1, False).add_(out),
        lambda out, x: F.feature_alpha_dropout(x, 0.1, False).add_(out),
        lambda out, x: torch.einsum("ij->ij", x).add_(out),
        lambda out, x: x.to(torch.float64).add_(out),
    ],
    ids=[
        *["itself", "view", "idle_cast", "part", "stretched", "dropout", "feature_dropout", "alpha_dropout"],
        *["feature_alpha_dropout", "einsum", "cast_that_is_idle_in_float64"],
    ],
)
def test_a_mark_that_would_hide_a_write_goes(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert ("branch", "input") not in marked(join)


class Remembers(nn.Module):
    """Keeps a table in a dictionary of its own once it runs for inference, as LeViT's attention does, and the last."""

    last: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.table, self.known = nn.Parameter(torch.zeros(3, 4)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "rows" not in self.known:
            self.known["rows"] = self.table[torch.tensor([0, 2, 1])]
        self.last = self.known["rows"] if self.last is None else self.last
        return x + self.last.sum(0)


def test_a_table_that_a_module_remembers_does_not_outlive_a_run_on_fake_tensors() -> None:
    with torch.device("meta"):
        model = Remembers().eval()
    x = {"x": torch.empty(2, 4, device="meta")}
    assert call_fake(model, model, x).shape == (2, 4)
    assert model.known == {}
    assert model.last is None
    graph = trace(model, x)
    assert [p.name for p in graph.parameters.values() if p.stored] == ["table"]
    assert model.known == {}
    assert model.last is None


class Program(nn.Module):
    """Steps on a growing list of 3 x 3 tensors: each takes two of them by number, writes to one or makes another."""

    def __init__(self, steps: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x + 1, x * 2]
        for name, first, second in self.steps:
            a, b = values[first % len(values)], values[second % len(values)]
            made = STEPS[name](a, b)
            values += [made] if made is not None else []
        return values


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "relu_": lambda a, b: a.relu_(),
    "relu_ and forget": lambda a, b: a.relu_() * 0 + 1,
    "add_": lambda a, b: a.add_(b.clone()),
    "mul_": lambda a, b: a.mul_(b if b is a else b.clone()),
    "row": lambda a, b: a[1:2].add_(b[0:1].clone()).expand(3, 3).clone(),
    "write a view": lambda a, b: a.reshape(9).clamp_(-1, 2).view(3, 3),
    "view": lambda a, b: a.reshape(9).view(3, 3),
    "turn": lambda a, b: a.t(),
    "sum": lambda a, b: a + b,
    "copy": lambda a, b: a.clone().copy_(b),
    "silu inplace": lambda a, b: nn.functional.silu(a, inplace=True),
    "halves": lambda a, b: a.half().add_(b).float(),
}
"""What a program can do with two of its tensors."""


def functional(steps: Sequence[tuple[str, int, int]]) -> tuple[nn.Module, bool]:
    """The program as a graph, and whether all its writes could be replaced."""
    with torch.no_grad():
        graph = torch.export.export(Program(steps).eval(), (torch.ones(3, 3),), strict=False).module()
    done = make_functional(graph.graph)
    graph.recompile()
    assert done == (not any(mutates(node) for node in graph.graph.nodes))
    return graph, done


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), max_size=8))
def test_a_graph_without_writes_computes_what_the_program_computes(steps: list[tuple[str, int, int]]) -> None:
    graph, _ = functional(steps)
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(graph(x), Program(steps)(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("steps", "done"),
    [
        ([("sum", 0, 1), ("relu_ and forget", 2, 0), ("sum", 3, 1)], True),
        ([("sum", 0, 1), ("copy", 2, 0)], True),
        ([("view", 0, 0), ("relu_", 2, 0)], False),  # read by its first name afterwards
        ([("halves", 0, 1)], False),  # would be promoted
    ],
)
def test_a_write_is_replaced_if_no_other_name_is_read_after_it(steps: list[tuple[str, int, int]], done: bool) -> None:
    assert functional(steps)[1] is done


class Mapped(nn.Module):
    """A mask by ``vmap``, as libraries make them of a function of two positions."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.linear, self.same, self.written = nn.Linear(4, 4), nn.Identity(), written

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1], device=x.device)
        mask = torch.vmap(lambda q: torch.vmap(lambda k: ((k <= q) & (k + 2 > q)).to(x.dtype))(rows))(rows)
        named = self.same(mask)
        if self.written:
            mask.mul_(2.0)  # and so is what has another name
        y: Tensor = self.linear(x)
        return y + named.sum(0)[None, :, None]


@pytest.mark.parametrize("written", [False, True])
def test_a_model_may_map_and_write_to_what_came_of_it(written: bool) -> None:
    """What ``vmap`` maps over hides its memory."""
    graph = trace(Mapped(written).to("meta").eval(), {"x": torch.ones(2, 5, 4, device="meta")})
    [total] = [node for node in graph.nodes if "aten.sum" in str(node.target)]
    assert ("aten.mul" in str(total.all_input_nodes[0].target)) is written


def test_a_forward_that_a_model_was_given_is_put_back() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y

    model = Doubled().to("meta").eval()
    plain = model.forward

    def wrapped(x: Tensor) -> Tensor:
        return plain(x) * 2

    model.forward = wrapped  # type: ignore[method-assign]
    graph = trace(model, {"x": torch.zeros(2, 4, device="meta")})
    assert model.__dict__["forward"] is wrapped
    assert any("aten.mul" in str(node.target) for node in graph.nodes), "what was traced is what the model does"
