"""Values of integer inputs that are known while a model is traced."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normconvert.analysis.norms import find_norms
from normconvert.analysis.streams import Analysis
from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.tracing.calls import without_values
from normconvert.tracing.graph import trace
from normconvert.tracing.known_values import KnownValues
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb

WIDTH = 12


class Packed(nn.Module):
    """A vision tower for pictures of several sizes, packed: everything about them follows from ``grid``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.rows, self.columns = nn.Embedding(9, WIDTH), nn.Embedding(9, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, patches: Tensor, grid: Tensor, kept: Tensor) -> Tensor:
        x = self.embed(patches)
        places = [
            torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).view(-1, 2)
            for h, w in grid.tolist()
        ]
        place = torch.cat(places).to(x.device)
        x = x + self.rows(place[:, 0]) + self.columns(place[:, 1])
        lengths = grid.prod(-1)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        if lengths.max() > 100:
            raise ValueError("too long")
        parts = [self.norm(x[a:b]) for a, b in itertools.pairwise(ends)]
        x = x + self.down(torch.relu(self.up(torch.cat(parts))))
        return self.head(self.last(x[kept]))


def packed_inputs() -> dict[str, Tensor]:
    grid = torch.tensor([[2, 3], [1, 4], [3, 3]])
    kept = torch.arange(19) % 3 > 0
    return {"patches": torch.randn(19, 5, dtype=torch.float64), "grid": grid, "kept": kept}


def test_a_model_whose_sizes_depend_on_integer_inputs_is_traced_and_converts() -> None:
    model = Packed().double().eval()
    perturb(model, 0)
    inputs = packed_inputs()
    with torch.device("meta"):
        skeleton = Packed().double()
    graph = trace(skeleton, {**inputs, "patches": inputs["patches"].to("meta")})
    plan = plan_rmsnorm(graph, Options())
    assert sorted(v.path for v in plan.converted) == ["last", "norm"]
    converted = algebra_model(model, plan)
    assert not any(isinstance(m, nn.LayerNorm) for m in converted.modules())
    torch.testing.assert_close(converted(**inputs), model(**inputs), rtol=1e-10, atol=1e-12)


def test_without_values_it_is_not_traced() -> None:
    with torch.device("meta"):
        skeleton = Packed()
    with pytest.raises(TraceError, match="traced"):
        trace(skeleton, without_values(packed_inputs()))


def answers(function: Any, *known: Tensor, unknown: tuple[Tensor, ...] = ()) -> tuple[Any, KnownValues]:
    """What a function gives on tensors without values of which the first ones are known."""
    values = KnownValues()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (*known, *unknown)]
        for tensor, value in zip(fake, known, strict=False):
            values.note(tensor, value)
        with values:
            return function(*fake), values


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda g: g.tolist(), [[1, 2], [3, 4]]),
        (lambda g: int(g.sum()), 10),
        (lambda g: bool((g > 3).any()), True),
        (lambda g: g.max().item() + len(range(g[0, 1])), 6),
        (lambda g: 3 in g, True),
        (lambda g: torch.zeros(g[1, 0], g[0, 1]).shape, (3, 2)),
        (lambda g: torch.arange(9)[g[0, 0] : g[1, 1]].tolist(), [1, 2, 3]),
        (lambda g: (g == 2).nonzero().tolist(), [[0, 1]]),
        (lambda g: g[g > 1].tolist(), [2, 3, 4]),
        (lambda g: torch.unique(g // 2).tolist(), [0, 1, 2]),
        (lambda g: torch.repeat_interleave(g[:, 0], g[:, 1]).tolist(), [1, 1, 3, 3, 3, 3]),
    ],
)
def test_known_values_answer_as_on_the_cpu(function: Any, expected: Any) -> None:
    grid = torch.tensor([[1, 2], [3, 4]])
    assert function(grid) == expected
    assert answers(function, grid)[0] == expected


def test_the_shape_of_an_unknown_value_makes_known_lengths_which_can_be_iterated() -> None:
    def lengths(unknown: Tensor) -> tuple[list[int], torch.Size]:
        counts = 3 * unknown.new_ones(2, dtype=torch.long)
        rows = unknown.new_zeros(2, 4)
        for i, (row, count) in enumerate(zip(unknown, counts, strict=True)):
            rows[i, :count] = row[:count]
        return counts.tolist(), rows.shape

    got, _ = answers(lengths, unknown=(torch.randn(2, 5),))
    assert got == ([3, 3], (2, 4))


def test_a_mask_picks_from_unknown_values() -> None:
    mask = torch.tensor([True, False, True])
    picked, values = answers(lambda m, x: x[m], mask, unknown=(torch.empty(3, 4),))
    assert picked.shape == (2, 4)
    assert values.value(picked) is None
    repeated, _ = answers(
        lambda n, x: x.repeat_interleave(n, dim=0), torch.tensor([2, 0, 3]), unknown=(torch.empty(3, 4),)
    )
    assert repeated.shape == (5, 4)


class PicksImages(nn.Module):
    """Leaves out the images that are zero, as models of several images to a text do with their padding."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        real = (images == 0).sum(1) != images.shape[1]
        found: Tensor = self.norm(self.proj(images[real]))
        return found


def test_what_a_mask_picks_of_an_input_is_the_inputs_still() -> None:
    with torch.device("meta"):
        model = PicksImages()
    images = torch.tensor([[1.0] * 6, [0.0] * 6, [2.0] * 6])
    graph = trace(model, {"images": images})
    (made,) = graph.outputs
    assert tuple(made.meta["val"].shape) == (2, 8)
    assert made in Analysis(graph, find_norms(graph)).data
    picked, values = answers(lambda x: x[x[:, 0] > 0], images)
    known = values.value(picked)
    assert known is not None
    assert torch.equal(known, images[[0, 2]])


def test_a_known_write_is_followed_and_an_unknown_one_forgotten() -> None:
    def written(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = known.clone(), known.clone()
        view = second[1:]
        first[0] = 7
        second[1] = unknown[0]  # a write to a tensor is one to all its views
        return first, second, view

    (first, second, view), values = answers(written, torch.tensor([1, 2, 3]), unknown=(torch.tensor([5]),))
    known = values.value(first)
    assert known is not None
    assert known.tolist() == [7, 2, 3]
    assert values.value(second) is None
    assert values.value(view) is None


def _through_out(whole: Tensor, unknown: Tensor) -> None:
    torch.add(unknown, 1, out=whole[1:])


def _through_data(whole: Tensor, unknown: Tensor) -> None:
    whole.data[1:].copy_(unknown)


def _through_an_unknown_view(whole: Tensor, unknown: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        view = whole[1:]  # as where a view cannot be computed on the CPU
    view.copy_(unknown)


def _by_another_name(whole: Tensor, unknown: Tensor) -> None:
    torch.clamp(unknown, max=3, out=whole.detach()[1:])


@pytest.mark.parametrize(
    "write",
    [
        lambda whole, unknown: whole[1:].copy_(unknown),
        lambda whole, unknown: torch.nn.functional.dropout(whole[1:], 0.5, inplace=True),
        _through_out,
        _through_data,
        _through_an_unknown_view,
        _by_another_name,
    ],
)
def test_an_unknown_write_through_a_view_is_forgotten_in_the_whole(write: Any) -> None:
    def written(known: Tensor, unknown: Tensor) -> Tensor:
        whole = known.clone()
        write(whole, unknown)
        return whole

    whole, values = answers(written, torch.tensor([1.0, 2, 3]), unknown=(torch.tensor([5.0, 6]),))
    assert values.value(whole) is None


def test_a_known_write_through_a_view_is_known_in_the_whole_and_not_in_a_copy() -> None:
    def written(known: Tensor) -> tuple[Tensor, ...]:
        whole = known.clone()
        copy = torch.cat([whole])
        view = whole[1:]
        torch.nn.functional.relu(view, inplace=True)
        view[0] += 5
        return whole, view, copy

    made, values = answers(written, torch.tensor([-1, -2, 3]))
    found = [values.value(tensor) for tensor in made]
    assert [None if value is None else value.tolist() for value in found] == [[-1, 5, 3], [5, 3], [-1, -2, 3]]


@pytest.mark.parametrize(
    "function",
    [
        *[torch.rand_like, torch.randn_like, torch.bernoulli],
        lambda x: x.log_normal_(),
        lambda x: x.clone().cauchy_(),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.rrelu(-1 - x, training=True),
    ],
)
def test_random_values_are_unknown(function: Any) -> None:
    made, values = answers(lambda x: function(x.float()), torch.ones(3, dtype=torch.int64))
    assert values.value(made) is None


def test_large_tensors_are_not_computed() -> None:
    made, values = answers(lambda x: torch.ones(1 << 40, 1 << 10), torch.ones(3))
    assert made.shape == (1 << 40, 1 << 10)
    assert values.value(made) is None


def test_a_tensor_that_is_written_to_before_it_is_read_is_known() -> None:
    def ends(lengths: Tensor) -> list[int]:
        made = torch.empty(len(lengths) + 1, dtype=torch.int64)
        made[0] = 0
        made[1:] = lengths.cumsum(0)
        return made.tolist()

    lengths = torch.tensor([2, 3, 4])
    assert answers(ends, lengths)[0] == ends(lengths) == [0, 2, 5, 9]


def test_numbers_that_become_a_tensor_are_known() -> None:
    made, values = answers(lambda x: torch.tensor([x[0] + 1, x[1].item()]), torch.tensor([1, 5]))
    known = values.value(made)
    assert known is not None
    assert known.tolist() == [2, 5]


def test_what_vmap_maps_over_is_unknown() -> None:
    def mapped(known: Tensor, unknown: Tensor) -> Tensor:
        return torch.vmap(lambda row: torch.ones_like(row) * 2 + row)(known) + unknown

    made, values = answers(mapped, torch.tensor([[1, 2], [3, 4]]), unknown=(torch.tensor([5, 6]),))
    assert made.shape == (2, 2)
    assert values.value(made) is None


class _AsLongAsItsValues(nn.Module):
    """How many tokens are left depends on values that no trace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        count = int((self.gate(x) > 0).sum())
        return x.new_zeros(count, WIDTH) if count > 1 else x


def test_where_a_trace_stops_no_graph_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = _AsLongAsItsValues().eval()
    with pytest.raises(TraceError, match="depends on values"):
        trace(model, {"x": torch.randn(3, WIDTH, device="meta")})
    assert capfd.readouterr().err == ""
