"""What a Python user writes for an option is taken where it can mean one thing, and else refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normconvert
from normconvert.errors import InputError
from tests.support.perturb import perturb


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.write(x)))
        return result


def converted(method: str, **options: Any) -> Any:
    net = perturb(Net().eval())
    return normconvert.convert_model(net, method=method, example_inputs=(torch.randn(2, 5),), **options)[1]


def test_a_number_or_a_list_is_the_text_that_it_says() -> None:
    assert converted("scale", power=3).options["power"] == "3"
    with pytest.raises(InputError, match="--keep n1: the model has no tensor and no module of that name"):
        converted("fold", keep=["n1", "n2"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_gain": "3"}, "min_gain is '3'; expected a whole number"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"seed": 1 << 64}, r"seed is 18446744073709551616; expected less than 2\^64"),
        ({"fold": "yes"}, "fold is 'yes'; expected True or False"),
        ({"headroom": "much"}, "headroom is 'much'; expected a number"),
        ({"headroom": float("nan")}, "headroom is nan; expected a finite number"),
        ({"headroom": float("inf")}, "headroom is inf; expected a finite number"),
        ({"keep": 1.5}, "keep is 1.5; expected text"),
    ],
)
def test_another_type_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        converted("rmsnorm", **options)


@pytest.mark.parametrize("keep", ["", ",", " , "])
def test_a_list_that_keeps_nothing_is_refused(keep: str) -> None:
    """A variable of a shell that is not set, say: what it was meant to keep would change without a word."""
    with pytest.raises(InputError, match="names no tensor and no module"):
        converted("fold", keep=keep)


def test_a_headroom_that_no_norm_bears_is_refused_by_its_own_name() -> None:
    with pytest.raises(InputError, match=r"--headroom 1e\+200: a stream would be divided by 2\^6\d\d, and norms"):
        converted("scale", headroom=1e200)
