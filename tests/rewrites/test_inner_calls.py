"""A class without a head is proved with the class that holds it, if it does there what it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from normconvert.rewrites.inner_calls import runs_inside
from normconvert.tracing.graph import trace
from normconvert.tracing.model_graph import trace_model

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def _on_meta(name: str, config: Any) -> Any:
    with torch.device("meta"):
        return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("whole", "base", "config"),
    [
        ("GPT2LMHeadModel", "GPT2Model", transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
        ("LlamaForCausalLM", "LlamaModel", transformers.LlamaConfig(**SIZES, intermediate_size=48)),
    ],
)
def test_a_base_that_runs_alone_as_within_the_whole(whole: str, base: str, config: Any) -> None:
    outer = _on_meta(whole, config)
    assert runs_inside(trace_model(_on_meta(base, config)), trace_model(outer), outer.base_model_prefix)


@pytest.mark.parametrize("changed", [{"layer_norm_epsilon": 1e-3}, {"n_layer": 1}, {"activation_function": "relu"}])
def test_one_that_does_something_else_does_not(changed: dict[str, Any]) -> None:
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    outer = trace_model(_on_meta("GPT2LMHeadModel", transformers.GPT2Config(**settings)))
    base = _on_meta("GPT2Model", transformers.GPT2Config(**{**settings, **changed}))
    assert not runs_inside(trace_model(base), outer, "transformer")


def test_a_base_with_a_pooler_that_the_whole_does_without_does_more() -> None:
    config = transformers.BertConfig(**SIZES, intermediate_size=48)
    outer = trace_model(_on_meta("BertForMaskedLM", config))
    assert not runs_inside(trace_model(_on_meta("BertModel", config)), outer, "bert")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.second(self.first(x).tanh() * (x if y is None else y))


class Plain(nn.Module):
    """Calls the base with what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Base()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


class Scaled(Plain):
    """Changes what the base reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(2 * x)


class Tied(Plain):
    """The base's two layers are one here."""

    def __init__(self) -> None:
        super().__init__()
        self.base.second = self.base.first


class Joined(Plain):
    """Gives the base one value twice, where it takes two of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x, x)


class Twice(Plain):
    """Calls the base a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(self.base(x))


@pytest.mark.parametrize(("whole", "same"), [(Plain, True), (Scaled, False), (Tied, False), (Twice, False)])
def test_what_enters_the_base_and_its_tensors_are_the_same(whole: type[nn.Module], same: bool) -> None:
    with torch.device("meta"):
        inputs = {"x": torch.ones(2, 4)}
        inner, outer = trace(Base().double(), inputs), trace(whole().double(), inputs)
    assert runs_inside(inner, outer, "base") is same


def test_two_inputs_are_not_one() -> None:
    with torch.device("meta"):
        inner = trace(Base(), {"x": torch.ones(2, 4), "y": torch.ones(2, 4)})
        outer = trace(Joined(), {"x": torch.ones(2, 4)})
    assert not runs_inside(inner, outer, "base")


def test_a_subclass_is_another_class() -> None:
    class Other(Base):
        pass

    with torch.device("meta"):
        inner, outer = trace(Other(), {"x": torch.ones(2, 4)}), trace(Plain(), {"x": torch.ones(2, 4)})
    assert not runs_inside(inner, outer, "base")
