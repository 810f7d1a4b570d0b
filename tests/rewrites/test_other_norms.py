"""Norms that a conversion is not about are named: which, how many, why it leaves them, what is for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normconvert.cli import run
from normconvert.options import METHODS
from normconvert.rewrites.other_norms import other_norms
from normconvert.tracing.graph import trace


class EvoNorm(nn.Module):
    """Divides by the deviation of a group of an image's channels, as EvoNorm-S0 does."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], 2, -1)
        spread = (groups.var(-1, keepdim=True) + 1e-5).sqrt()
        return ((x * torch.sigmoid(x)).reshape(groups.shape) / spread).reshape(x.shape)


class Norms(nn.Module):
    """One norm of each kind, GroupNorm twice, and one in a module that is called something else."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(4, 4))
        self.instance, self.evo, self.batch = nn.InstanceNorm2d(4), EvoNorm(), nn.BatchNorm2d(4)
        self.layer, self.rms = nn.LayerNorm(4), nn.RMSNorm(4, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.evo(self.instance(self.groups(x))))
        return self.rms(self.layer(x.permute(0, 2, 3, 1)).relu()).mean()


@pytest.mark.parametrize("method", METHODS)
def test_each_norm_that_is_not_for_a_conversion_is_named_once(method: str) -> None:
    graph = trace(Norms().to("meta"), {"x": torch.empty(1, 4, 6, 6, device="meta")})
    said = other_norms(graph, method)
    families = {"1 BatchNorm2d": "BatchNorm", "1 LayerNorm": "LayerNorm", "1 RMSNorm": "RMSNorm"}
    expected = dict.fromkeys(["2 GroupNorm", "1 InstanceNorm2d", "1 EvoNorm"], "no conversion is for it")
    for name, family in families.items():
        meant = [other for other, norms in METHODS.items() if re.search(rf"\b{family}\b", norms)]
        if method not in meant:
            expected[name] = f"see {', '.join(meant)}"
    assert {line.partition(":")[0]: line.rpartition("; ")[2] for line in said} == expected


def test_inspect_and_a_refusal_say_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["inspect", "demo:convnet"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "none that rmsnorm is about others 15 BatchNorm2d:" in said
    assert "see fuse-bn" in said
    assert run(["rmsnorm", "demo:convnet", str(tmp_path / "out")]) == 3
    assert "has no LayerNorm\n  15 BatchNorm2d: " in capsys.readouterr().err
