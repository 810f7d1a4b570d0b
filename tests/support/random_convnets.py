"""Random convolutional networks with affine norms in all the wrong places."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

Maker = Callable[[random.Random, int], tuple[nn.Module, int]]
"""(random, channels in) -> (module, channels out); all take and give (batch, channels, height, width)."""


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, name: str, *args: Any) -> None:
        super().__init__()
        self.name, self.args = name, args

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, *self.args)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "double": lambda x: x * 2.0,
    "plus one": lambda x: x + 1.0,
    "negate": lambda x: -x,
    "transpose": lambda x: x.transpose(2, 3),
    "there and back": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "pad edges": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "roll": lambda x: x.roll(1, 2),
    "slice": lambda x: x[:, :, 1:],
    "mean": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
    "sum": lambda x: x + x.sum(2, keepdim=True),
    "shuffle": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "softmax": lambda x: x.softmax(1),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "one gate": lambda x: x * x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "parts": lambda x: torch.cat([x[:, :1], x[:, 1:] * 3.0], 1),
    "reverse": lambda x: x.flip(1),
}


def conv(r: random.Random, c: int) -> tuple[nn.Module, int]:
    groups = r.choice([1, 1, 2, c])
    out = r.choice([c, 2 * groups, 4 * groups])
    kernel = r.choice([1, 1, 3])
    return nn.Conv2d(c, out, kernel, padding=r.choice([0, kernel // 2]), groups=groups, bias=r.random() < 0.5), out


def transposed(r: random.Random, c: int) -> tuple[nn.Module, int]:
    groups = r.choice([1, 2])
    kernel = r.choice([1, 2, 3])
    stride = r.choice([1, kernel])
    return nn.ConvTranspose2d(c, 2 * groups, kernel, stride, groups=groups, bias=r.random() < 0.5), 2 * groups


class Linear(nn.Linear):
    """A linear map over the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def linear(r: random.Random, c: int) -> tuple[nn.Module, int]:
    out = r.choice([c, 4, 6])
    return Linear(c, out, bias=r.random() < 0.5), out


class Tokens(nn.BatchNorm1d):
    """BatchNorm over a flattened picture, as hybrid transformers have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1).reshape(-1, x.shape[1])).reshape(x.movedim(1, -1).shape).movedim(-1, 1)


def norm(r: random.Random, c: int) -> tuple[nn.Module, int]:
    kind = r.choice(["bn", "bn", "bn", "no affine", "frozen", "batch", "tokens", "act"])
    if kind == "frozen":
        return FrozenBatchNorm2d(c), c
    if kind == "tokens":
        return Tokens(c), c
    if kind == "act":
        from timm.layers import BatchNormAct2d

        return BatchNormAct2d(c, apply_act=r.random() < 0.5), c
    return nn.BatchNorm2d(c, eps=r.choice([1e-5, 1e-2]), affine=kind != "no affine",
                          track_running_stats=kind != "batch"), c  # fmt: skip


def rectified(r: random.Random, c: int) -> tuple[nn.Module, int]:
    """A norm, a clamp, and most often a linear map that reads it: what a norm's bounds are for."""
    clamp = r.choice([nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.25)])
    steps: list[nn.Module] = [norm(r, c)[0], clamp]
    if r.random() < 0.3:
        steps.append(nn.AvgPool2d(2, 1))
    if r.random() < 0.8:
        made, c = r.choice([conv, linear, transposed])(r, c)
        steps.append(made)
    return nn.Sequential(*steps), c


def plain(r: random.Random, c: int) -> tuple[nn.Module, int]:
    made = [nn.ReLU(), nn.GELU(), nn.Dropout(), nn.Identity(), nn.AvgPool2d(2, 1), nn.AvgPool2d(3, 1, 1)]
    made += [nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(3)]
    return r.choice(made), c


def function(r: random.Random, c: int) -> tuple[nn.Module, int]:
    names = [n for n in FUNCTIONS if c % 2 == 0 or n not in ("shuffle", "halves")]
    names = [n for n in names if c > 1 or n != "parts"]
    return Do(r.choice(names)), c


class Join(nn.Module):
    """Branches on one input, joined."""

    def __init__(self, kind: str, branches: list[nn.Module]) -> None:
        super().__init__()
        self.kind, self.branches = kind, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        size = [min(p.shape[d] for p in parts) for d in (2, 3)]
        parts = [p[:, :, : size[0], : size[1]] for p in parts]
        if self.kind == "cat":
            return torch.cat(parts, 1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part if self.kind == "sum" else total - part if self.kind == "difference" else total * part
        return total


def join(r: random.Random, c: int) -> tuple[nn.Module, int]:
    kind = r.choice(["sum", "sum", "cat", "difference", "product"])
    branches, outs = [], []
    for _ in range(r.choice([2, 2, 3])):
        branch, out = chain(r, c, r.randint(0, 3))
        if kind != "cat" and out != 4:
            branch, out = nn.Sequential(branch, nn.Conv2d(out, 4, 1, bias=r.random() < 0.5)), 4
            if r.random() < 0.4:
                branch = nn.Sequential(branch, nn.BatchNorm2d(4))
        branches.append(branch)
        outs.append(out)
    return Join(kind, branches), sum(outs) if kind == "cat" else 4


MAKERS: list[Maker] = [
    conv,
    conv,
    conv,
    norm,
    norm,
    norm,
    norm,
    plain,
    plain,
    rectified,
    rectified,
    function,
    linear,
    transposed,
    join,
]


def chain(r: random.Random, c: int, length: int) -> tuple[nn.Module, int]:
    steps: list[nn.Module] = []
    for _ in range(length):
        made, c = r.choice(MAKERS)(r, c)
        steps.append(made)
        if steps and r.random() < 0.05:
            again = r.choice(steps)  # a module that is called twice
            if isinstance(again, (nn.BatchNorm2d, nn.ReLU)) and getattr(again, "num_features", c) == c:
                steps.append(again)
    return nn.Sequential(*steps), c


class Network(nn.Module):
    """A random network; some return a value from the middle as well."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        self.stem, c = chain(r, 4, r.randint(1, 4))
        self.trunk, c = chain(r, c, r.randint(2, 6))
        self.also = r.random() < 0.2

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(image)
        y = self.trunk(x)
        return (y, x) if self.also else (y,)
