"""LayerNorm written by hand is LayerNorm in whatever spelling, and what only looks like it is none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normconvert.analysis.handwritten import Forms
from tests.support.network_parts import Op, param
from tests.support.small_models import VOCAB, D, converted, plan_of, verdict

Spelled = Callable[[Tensor], Tensor]
EPS = 1e-3

MEANS: dict[str, Spelled] = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "unsqueezed": lambda x: x.mean(-1).unsqueeze(-1),
    "indexed": lambda x: torch.mean(x, dim=2)[..., None],
    "sum": lambda x: x.sum(-1, keepdim=True) / x.shape[-1],
    "scaled sum": lambda x: (1 / x.shape[-1]) * x.sum(dim=-1, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, -1, keepdim=True)[1],
    "std_mean": lambda x: torch.std_mean(x, dim=-1, correction=0, keepdim=True)[1],
    "expanded": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "viewed": lambda x: x.mean(-1).view(*x.shape[:-1], 1),
    "reshaped": lambda x: x.mean(2).reshape(x.shape[0], -1, 1),
    "squeezed": lambda x: x.mean(-1, keepdim=True).squeeze(-1).unsqueeze(-1),
    "own dtype": lambda x: x.mean(-1, keepdim=True, dtype=x.dtype),
}
CENTRED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minus": lambda x, m: x - m,
    "subtract": torch.subtract,
    "plus negative": lambda x, m: -m + x,
    "reversed": lambda x, m: -(m - x),
    "rsub": lambda x, m: torch.rsub(m, x),
    "twice": lambda x, m: (2 * (x - m)) / 2,
}
VARIANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda x, c: c.square().mean(-1, keepdim=True),
    "power": lambda x, c: c.pow(2).mean(-1, keepdim=True),
    "product": lambda x, c: (c * c).sum(-1, keepdim=True) / x.shape[-1],
    "var": lambda x, c: x.var(-1, unbiased=False, keepdim=True),
    "var of centred": lambda x, c: c.var(dim=-1, correction=0).unsqueeze(-1),
    "unbiased": lambda x, c: x.var(-1, keepdim=True) * ((x.shape[-1] - 1) / x.shape[-1]),
    "var_mean": lambda x, c: torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)[0],
    "std": lambda x, c: x.std(-1, unbiased=False, keepdim=True) ** 2,
    "length": lambda x, c: torch.linalg.vector_norm(c, dim=-1, keepdim=True).square() / x.shape[-1],
    "moments": lambda x, c: (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2,
    "bounded": lambda x, c: x.var(-1, unbiased=False, keepdim=True).clamp(min=0),
    "bounded moments": lambda x, c: torch.relu((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()),
    "einsum": lambda x, c: torch.einsum("btc, btc -> bt", c, c)[..., None] / x.shape[-1],
    "vecdot": lambda x, c: torch.linalg.vecdot(c, c).unsqueeze(-1) / x.shape[-1],
    "viewed": lambda x, c: x.var(-1, correction=0).view(*x.shape[:-1], 1),
}
ENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rsqrt": lambda c, v: c * torch.rsqrt(v + EPS),
    "sqrt": lambda c, v: c / torch.sqrt(v + EPS),
    "half power": lambda c, v: c / (v + EPS) ** 0.5,
    "negative power": lambda c, v: (EPS + v).pow(-0.5) * c,
    "reciprocal": lambda c, v: c * (v + EPS).sqrt().reciprocal(),
    "one over": lambda c, v: c * (1 / torch.sqrt(v.add(EPS))),
    "root of one over": lambda c, v: c * torch.sqrt(1.0 / (v + EPS)),
    "scaled": lambda c, v: c / torch.sqrt(4 * v + 4 * EPS) * 2,
}


def spell(mean: str, centred: str, variance: str, end: str) -> Spelled:
    def norm(x: Tensor) -> Tensor:
        c = CENTRED[centred](x, MEANS[mean](x))
        return ENDS[end](c, VARIANCES[variance](x, c))

    return norm


class Block(nn.Module):
    """x + f(norm(x)) behind a linear map, before a LayerNorm: all of it converts if the norm is one."""

    def __init__(self, norm: Spelled) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, D)
        self.norm = Op(lambda m, x: norm(x) * m.gain + m.b, gain=param(D), b=param(D))
        self.branch, self.last, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y: Tensor = self.head(self.last(x + self.branch(self.norm(x))))
        return y


ALL = list(itertools.product(MEANS, CENTRED, VARIANCES, ENDS))
# Every spelling of every part at least once, with different others.
SOME = [
    tuple(list(part)[(i * step) % len(part)] for part, step in ((MEANS, 1), (CENTRED, 5), (VARIANCES, 3), (ENDS, 7)))
    for i in range(16)
]


@pytest.mark.parametrize(("mean", "centred", "variance", "end"), SOME)
def test_a_layer_norm_is_recognised_in_every_spelling(mean: str, centred: str, variance: str, end: str) -> None:
    plan = plan_of(lambda: Block(spell(mean, centred, variance, end)), min_gain=1)
    assert converted(plan) == {"norm", "last"}
    row = next(row for row in plan.modules if row["path"] == "norm")
    assert row["eps"] == pytest.approx(EPS, rel=1e-12)


def norms_of(function: Spelled, *shape: int) -> list[tuple[int, float]]:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with torch.device("meta"):
        exported = torch.export.export(One(), (torch.randn(*shape, dtype=torch.float64, device="meta"),))
    return [(norm.place.dim, norm.eps) for norm in Forms(exported.graph.nodes).norms.values()]


def test_all_combinations_are_recognised() -> None:
    for parts in random.Random(0).sample(ALL, 60):
        found = norms_of(spell(*parts), 2, 3, 5)
        assert [dim for dim, _ in found] == [2], parts
        assert found[0][1] == pytest.approx(EPS, rel=1e-12), parts


def rstd(x: Tensor) -> Tensor:
    return (x.var(-1, correction=0, keepdim=True) + EPS).rsqrt()


NONE: dict[str, Spelled] = {
    "eps outside the root": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, unbiased=False, keepdim=True) + EPS),
    "unbiased": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt(),
    "clamped": lambda x: torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1) * x.shape[-1] ** 0.5,
    "uncentred variance": lambda x: (x - x.mean(-1, keepdim=True)) * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt(),
    "not centred": lambda x: x * (x.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt(),
    "half centred": lambda x: (x - 0.5 * x.mean(-1, keepdim=True)) * rstd(x),
    "other axes": lambda x: (x - x.mean(1, keepdim=True)) * rstd(x),
    "two values": lambda x: (x - x.mean(-1, keepdim=True)) * rstd(x.flip(1)),
    "negative": lambda x: (x.mean(-1, keepdim=True) - x) * rstd(x),
    "doubled": lambda x: (x - x.mean(-1, keepdim=True)) * 2 * rstd(x),
    "fourth root": lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + EPS).pow(-0.25),
    "eps subtracted": lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) - EPS).rsqrt(),
    "mean along the wrong axis": lambda x: (x - x.mean(-1)) * rstd(x),
    "factor along the wrong axis": lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0) + EPS).rsqrt(),
    "moments with another mean": lambda x: (
        (x - x.mean(-1, keepdim=True))
        * ((x * x).mean(-1, keepdim=True) - x.mean(1, keepdim=True) ** 2 + EPS).rsqrt()
    ),
    "moments not squared": lambda x: (
        (x - x.mean(-1, keepdim=True)) * ((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) + EPS).rsqrt()
    ),
    "rounded": lambda x: torch.div(
        x - x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + EPS).sqrt(), rounding_mode="floor"
    ),
    "summed twice": lambda x: (
        (x - x.mean(-1, keepdim=True).sum(-1, keepdim=True).sum(1, keepdim=True))
        * rstd(x)
    ),
    "alpha": lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2) * rstd(x),
    "viewed along the wrong axis": lambda x: (x - x.mean(-1).view(4, 1, 4)) * rstd(x),
    "bounded from below": lambda x: (
        (x - x.mean(-1, True)) * (x.var(-1, correction=0, keepdim=True).clamp(0.1) + EPS).rsqrt()
    ),
    "bounded from above": lambda x: (
        (x - x.mean(-1, True)) * (x.var(-1, correction=0, keepdim=True).clamp(0, 1) + EPS).rsqrt()
    ),
    "product with another": lambda x: (c := x - x.mean(-1, True)) * (
        torch.einsum("abc,acb->ab", c, c)[..., None] / 4 + EPS
    ).rsqrt(),
    "product over another axis": lambda x: (c := x - x.mean(-1, True)) * (
        torch.einsum("abc,abc->ac", c, c)[:, :, None] / 4 + EPS
    ).rsqrt(),
    "product that turns": lambda x: (c := x - x.mean(-1, True)) * (
        torch.einsum("abc,abc->ba", c, c)[..., None] / 4 + EPS
    ).rsqrt(),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_what_only_looks_like_a_layer_norm_is_none(name: str) -> None:
    assert norms_of(NONE[name], 4, 4, 4) == []  # of shapes that hide a dimension too many


LEAKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, y: y + x.mean(-1, keepdim=True),
    "square": lambda x, y: y + (x * x).mean(-1, keepdim=True),
    "half a variance": lambda x, y: y + (x * x).mean(-1, keepdim=True) - 0.5 * x.mean(-1, keepdim=True) ** 2,
    "mean of var_mean": lambda x, y: y * torch.var_mean(x, -1, keepdim=True)[1],
    "square alone": lambda x, y: y + x.square(),
    "copy": lambda x, y: y + x.clone(),
    "multiple": lambda x, y: y + 2 * x,
    "viewed mean": lambda x, y: y + x.mean(-1).view(*x.shape[:-1], 1),
    "dot": lambda x, y: y + torch.linalg.vecdot(x, x)[..., None],
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_mean_that_goes_elsewhere_is_a_leak(name: str) -> None:
    class Leaking(Block):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            y: Tensor = self.head(LEAKS[name](x, self.last(x + self.branch(self.norm(x)))))
            return y

    plan = plan_of(lambda: Leaking(spell("mean", "minus", "moments", "rsqrt")), min_gain=1)
    assert "norm" not in converted(plan), verdict(plan, "norm").reason
