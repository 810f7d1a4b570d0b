"""The comparator refuses an edited model that is not the old one: each kind of edit of each conversion, broken once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites import comparison, crmsnorm, graph_values, planning  # noqa: F401  # registers them
from normconvert.rewrites.claims import unfounded
from normconvert.rewrites.comparison import compare
from normconvert.rewrites.edited_trace import Differs, trace_edited
from normconvert.rewrites.expected_changes import ExpectedChanges, expected_changes
from normconvert.rewrites.registry import REWRITES
from normconvert.tracing.graph import Graph, trace

OPTIONS = Options(min_gain=1)


class Stem(nn.Module):
    """Something that no weight can centre."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).tanh()


class Residual(nn.Module):
    """A stem, one residual block and a head, with a difference, a number and a constant tensor behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.block = Stem(), nn.LayerNorm(8), nn.Linear(8, 8)
        self.last, self.head, self.other = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.flipped, self.more, self.factor, self.dtype = False, False, 0.5, torch.float64
        self.offsets = [0.1, 0.2, 0.3, 0.4, 0.5]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(self.first(x))
        y = self.last(x)
        a, b = self.head(y), self.other(y)
        y = (b - a if self.flipped else a - b) * self.factor
        y = y + torch.tensor(self.offsets, dtype=self.dtype).double()
        return y.abs() if self.more else y


class Branches(nn.Module):
    """Two convolutions side by side, each with a norm: they are one."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 1, bias=False)
        self.norm_three, self.norm_one = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_three(self.three(x)) + self.norm_one(self.one(x))


class Convolutional(nn.Module):
    """A norm that moves before, one that becomes a clamp, and branches that merge."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.between, self.relu, self.reader = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)
        self.block = Branches()
        self.flipped, self.more, self.factor, self.dtype = False, False, 0.5, torch.float64
        self.offsets = [0.1]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.conv(x)))
        x = self.reader(self.relu(self.between(x)))
        y = torch.sigmoid(self.block(x))
        y = (y - x if self.flipped else x - y) * self.factor
        y = y + torch.tensor(self.offsets, dtype=self.dtype).double()
        return y.abs() if self.more else y


@dataclasses.dataclass(frozen=True)
class Case:
    """A conversion that holds."""

    graph: Graph
    plan: Plan
    expected: ExpectedChanges

    def compare(self, modules: Sequence[dict[str, Any]], change: Callable[[Any], object] = lambda model: None) -> None:
        """Compare the model that ``modules`` make of the original, changed before, with the original."""
        model = copy.deepcopy(self.graph.modules[""])
        change(model)
        graph = dataclasses.replace(self.graph, modules={**self.graph.modules, "": model})
        compare(self.graph, trace_edited(graph, modules, self.expected.untied), self.expected)


def skeleton(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind().double().eval()


@functools.cache
def case(method: str) -> Case:
    layers = method != "fuse-bn"
    model = skeleton(Residual if layers else Convolutional)
    size = (8, 12) if layers else (2, 6, 7, 7)
    graph = trace(model, {"x": torch.empty(size, dtype=torch.float64, device="meta")})
    drafts: list[ExpectedChanges] = []
    proving = comparison.prove

    def noting(graph: Graph, plan: Plan, expected: ExpectedChanges) -> None:
        drafts.append(expected)
        proving(graph, plan, expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crmsnorm, "prove", noting)
        plan = REWRITES[method].planner(graph, dataclasses.replace(OPTIONS, merge_branches=not layers))
    assert {row["op"] for row in plan.modules} == EDITS[method]
    return Case(graph, plan, drafts[-1] if drafts else expected_changes(graph, plan))


EDITS = {
    "rmsnorm": {"center", "replace"},
    "crmsnorm": {"compress", "replace", "resize"},
    "fuse-bn": {"bias", "absorb", "clip", "merge"},
}


@pytest.mark.parametrize("method", EDITS)
def test_the_edits_of_the_plan_make_the_old_model(method: str) -> None:
    case(method).compare(case(method).plan.modules)


Row = dict[str, Any]


def without(op: str, path: str = "") -> Callable[[Row], list[Row]]:
    return lambda row: [] if row["op"] == op and row["path"].startswith(path) else [row]


def with_other(op: str, **values: Any) -> Callable[[Row], list[Row]]:
    return lambda row: [{**row, **values} if row["op"] == op else row]


BROKEN: dict[str, tuple[str, Callable[[Row], list[Row]], str]] = {
    "rmsnorm: a hook is missing": ("rmsnorm", without("center"), "nothing centres the output of `stem` along axis -1"),
    "rmsnorm: a hook along another axis": ("rmsnorm", with_other("center", axis=0), "nothing centres the output"),
    "rmsnorm: a hook on the wrong writer": ("rmsnorm", with_other("center", path="block"), "nothing centres"),
    "rmsnorm: another eps": ("rmsnorm", with_other("replace", eps=1e-6), "`first` has the eps 1e-06, not 1e-05"),
    "rmsnorm: another axis": ("rmsnorm", with_other("replace", axis=0), "`first` has the axis 0, not -1"),
    "rmsnorm: another offset": ("rmsnorm", with_other("replace", offset=1.0), "`first` has the offset 1.0, not 0.0"),
    "rmsnorm: weight for bias": (
        "rmsnorm",
        with_other("replace", weight="bias", bias="weight"),
        "`first` uses other tensors",
    ),
    "rmsnorm: a norm stays": ("rmsnorm", without("replace", "last"), "`last` becomes"),
    "crmsnorm: a hook is missing": ("crmsnorm", without("compress"), "has the shape|dim|size"),
    "crmsnorm: another basis at a hook": ("crmsnorm", with_other("compress", basis="paper"), "nothing compresses"),
    "crmsnorm: another eps": ("crmsnorm", with_other("replace", eps=1e-6), "`first` has the eps 1e-06, not 1e-05"),
    "crmsnorm: a norm of the old width": ("crmsnorm", with_other("replace", size=9), "`first` has the size 8, not 7"),
    "crmsnorm: another basis": ("crmsnorm", with_other("replace", basis="paper"), "`first` has the basis paper"),
    "crmsnorm: a reader left out": ("crmsnorm", without("resize", "head"), "has the shape|dim|size"),
    "fuse-bn: a norm stays": ("fuse-bn", without("absorb"), r"aten.sigmoid.* becomes|sigmoid.* becomes"),
    "fuse-bn: a reader without its bias": ("fuse-bn", without("bias"), "does not use the bias"),
    "fuse-bn: no clamp": ("fuse-bn", without("clip"), "`between` is not the clamp"),
    "fuse-bn: the activation stays": ("fuse-bn", with_other("clip", activation=None), "`reader` becomes relu"),
    "fuse-bn: another stride": ("fuse-bn", with_other("merge", dilation=[2, 2], padding=[2, 2]), "not the convolution"),
    "fuse-bn: branches stay": ("fuse-bn", without("merge"), "`block` is not the convolution"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_edit_is_refused(name: str) -> None:
    method, change, why = BROKEN[name]
    rows = [new for row in case(method).plan.modules for new in change(row)]
    assert rows != case(method).plan.modules
    with pytest.raises(Differs, match=why):
        case(method).compare(rows)


CHANGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "operands swapped": (lambda m: setattr(m, "flipped", True), "sub in the model's own forward has the argument"),
    "another number": (lambda m: setattr(m, "factor", 0.25), "mul in the model's own forward has the argument 0.25"),
    "a whole number": (lambda m: setattr(m, "factor", 1), "has the argument 1, not 0.5"),
    "another constant": (lambda m: setattr(m, "offsets", [0.7] * len(m.offsets)), "constant .* has other values"),
    "a constant of another sign": (lambda m: setattr(m, "offsets", [-0.1] * len(m.offsets)), "has other values"),
    "a constant of another dtype": (lambda m: setattr(m, "dtype", torch.float32), r"is torch.float32, not"),
    "an operation more": (
        lambda m: setattr(m, "more", True),
        "abs in the model's own forward runs in addition",
    ),
}


@pytest.mark.parametrize("method", EDITS)
@pytest.mark.parametrize("name", CHANGED)
def test_a_model_that_computes_something_else_is_refused(name: str, method: str) -> None:
    change, why = CHANGED[name]
    with pytest.raises(Differs, match=why):
        case(method).compare(case(method).plan.modules, change)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (math.nan, math.nan, False),
        (math.nan, 0.5, False),
        (0.5, math.nan, False),
        (0.0, -0.0, False),
        (1, True, False),
        (1, 1.0, False),
        (1e-5, 1e-5, True),
        (torch.float32, torch.float64, False),
        (None, None, True),
    ],
)
def test_numbers_are_the_same_only_if_they_are(old: object, new: object, same: bool) -> None:
    assert graph_values.same_number(old, new) is same


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0]), True),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), False),
        (torch.tensor([1.0]), torch.tensor([math.nan]), False),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), False),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1]), torch.tensor([1, 1]), False),
        (torch.tensor([1]), None, False),
    ],
)
def test_constants_are_the_same_only_if_they_are(old: Tensor, new: Tensor | None, same: bool) -> None:
    assert graph_values.same_value(old, new) is same


UNFOUNDED: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "no hook": (
        lambda p: dataclasses.replace(p, modules=[r for r in p.modules if r["op"] != "center"]),
        "what `first` reads is not mean-free",
    ),
    "a hook on the wrong writer": (
        lambda p: dataclasses.replace(p, modules=[{**r, "path": "head"} if r["op"] == "center" else r
                                                  for r in p.modules]),
        "nothing may be centred at the output of `head`",
    ),
    "the wrong writer": (
        lambda p: dataclasses.replace(p, tensors={**p.tensors, "stem.map.weight": [{"op": "center", "axis": 0}]}),
        "`stem.map.weight` has readers that see its mean",
    ),
    "a writer along the wrong axis": (
        lambda p: dataclasses.replace(p, tensors={**p.tensors, "block.weight": [{"op": "center", "axis": 1}]}),
        "`block.weight` is edited otherwise",
    ),
    "a writer left out": (
        lambda p: dataclasses.replace(p, tensors={**p.tensors, "block.bias": p.tensors["block.bias"][:-1]}),
        "`block.bias` is edited otherwise",
    ),
    "a reader left out": (
        lambda p: dataclasses.replace(p, tensors={n: r for n, r in p.tensors.items() if n != "other.weight"}),
        "`other.weight` reads a norm whose weight has moved, and does not take it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOUNDED)
def test_an_edit_that_the_graph_does_not_bear_out_is_refused(name: str) -> None:
    graph, options = case("rmsnorm").graph, dataclasses.replace(OPTIONS, fold=True)
    plan = REWRITES["rmsnorm"].planner(graph, options)
    assert unfounded(graph, plan, options) == ""
    change, why = UNFOUNDED[name]
    assert why in unfounded(graph, change(plan), options)
