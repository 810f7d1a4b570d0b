"""A head that is stored beside the table it could be tied to is one tensor with it only where the two are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.sources import open_source
from normconvert.sources.tensor_names import names_apart
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import save_with_head

HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    return found


def original(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model


@pytest.mark.parametrize(
    ("method", "form"), [("rmsnorm", "safetensors"), ("crmsnorm", "safetensors"), ("crmsnorm", "bin")]
)
def test_a_head_that_differs_from_its_table_is_kept(method: str, form: str, tmp_path: Path) -> None:
    folder = save_with_head(tmp_path / "in", form)
    truth = logits(original(folder))
    report = normconvert.convert(folder, tmp_path / "out", method, tied="untie", verify=form == "bin")
    assert report.plan.converted
    found = logits(normconvert.load(tmp_path / "out", dtype=torch.float64))
    assert float((found - truth).norm() / truth.norm()) < 1e-6


def test_a_model_is_built_as_it_is_loaded(tmp_path: Path) -> None:
    source = open_source(str(save_with_head(tmp_path / "in")))
    for model in (source.skeleton(), source.load()):
        assert model.get_parameter(HEAD) is not model.get_parameter(TABLE)
    assert source.tied == ()
    fidelity = normconvert.verify(tmp_path / "in", tmp_path / "in", max_memory=4_000_000_000)
    assert fidelity.passed


def test_a_head_that_equals_its_table_is_tied(tmp_path: Path) -> None:
    source = open_source(str(save_with_head(tmp_path / "in", head=0.0)))
    assert source.tied == ((TABLE, HEAD),)
    model = source.skeleton()
    assert model.get_parameter(HEAD) is model.get_parameter(TABLE)


@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_a_table_that_is_stored_as_the_head_alone_is_kept(method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_with_head(tmp_path / "in", head=0.0)
    tensors = load_file(folder / "model.safetensors")
    del tensors[TABLE]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    truth = logits(original(folder))
    normconvert.convert(folder, tmp_path / "out", method, verify=False)
    assert {HEAD, TABLE} <= open_source(str(tmp_path / "out")).tensors.keys()
    assert float((logits(original(tmp_path / "out")) - truth).norm() / truth.norm()) < 1e-6


def test_modules_that_are_one_by_their_class_cannot_differ() -> None:
    values = {"a": lambda: torch.ones(2), "b": lambda: torch.zeros(2), "c": lambda: torch.ones(2)}
    assert names_apart([("a", "c")], {}, values) == (frozenset(), (("a", "c"),))
    assert names_apart([("a", "b", "c")], {"b": "a", "c": "a"}, values) == (frozenset("b"), (("a", "c"),))
    # As transformers has it: without the source's own value the first target's counts.
    assert names_apart([("x", "b", "c")], {"b": "x", "c": "x"}, values) == (frozenset("c"), (("x", "b"),))
    with pytest.raises(ValueError, match="a and b are one parameter of the model, but differ in the files"):
        names_apart([("a", "b")], {}, values)


@pytest.mark.parametrize("tied", ["center", "untie"])
def test_a_head_that_becomes_narrower_than_its_table_is_kept(tied: str, tmp_path: Path) -> None:
    """A norm behind the table keeps it as wide as it was, while the head reads a stream of a channel less."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=101, hidden_size=48, n_layer=2, n_head=3)
    model: Any = perturb(BloomForCausalLM(config).eval())
    model.save_pretrained(tmp_path / "in")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[HEAD] += 0.5 * torch.randn(state[HEAD].shape)
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    truth = logits(original(tmp_path / "in"))
    report = normconvert.convert(tmp_path / "in", tmp_path / "out", "crmsnorm", tied=tied)
    assert report.fidelity is not None
    assert report.fidelity.passed
    out = tmp_path / "out"
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float64).eval()
    for found in (normconvert.load(out, dtype=torch.float64), stock):
        assert float((logits(found) - truth).norm() / truth.norm()) < 1e-6
