"""Weights in the wrapping that training leaves around them are the same weights to every part that reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import normconvert
from normconvert.errors import InputError
from normconvert.sources import open_source
from tests.support.tiny_checkpoints import gpt2, save

WRAPPED: dict[str, Any] = {
    "a checkpoint of training": lambda state: {"state_dict": state, "epoch": 3},
    "data parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled, then parallel": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "all of it": lambda state: {"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
}


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(change(torch.load(file)), file)


@pytest.mark.parametrize("form", WRAPPED)
def test_wrapped_weights_load_as_they_are_converted(form: str, tmp_path: Path) -> None:
    model = gpt2()
    folder = save(model, tmp_path / "in", "bin")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    rewrite(folder, WRAPPED[form])
    loaded: Any = open_source(str(folder)).load()
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert (loaded.generation_config.max_new_tokens, loaded.name_or_path) == (7, str(folder))


def test_wrapped_weights_are_verified_as_what_they_are(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "in", "bin")
    rewrite(folder, WRAPPED["data parallel"])
    report = normconvert.convert(folder, tmp_path / "out")
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert normconvert.verify(folder, tmp_path / "out").passed


def test_a_model_loaded_twice_shares_no_memory(tmp_path: Path) -> None:
    source = open_source(str(save(gpt2(), tmp_path / "in", "bin")))
    first, second = source.load(), source.load()
    with torch.no_grad():
        first.lm_head.weight.zero_()  # type: ignore[union-attr, operator]
    assert second.lm_head.weight.abs().max() > 0  # type: ignore[union-attr, operator]
    assert source.read("lm_head.weight").abs().max() > 0


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_tensor_that_is_missing_when_the_model_is_loaded_ends_the_run(form: str, tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "in", form)
    source = open_source(str(folder))
    gone = "transformer.h.0.attn.c_attn.weight"
    if form == "bin":
        # The values of a pickle are mapped when it is opened.
        source = replace(source, tensors={name: info for name, info in source.tensors.items() if name != gone})
    else:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        del state[gone]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{gone} are missing"):
        source.load()


def test_a_pickle_that_is_cut_while_it_is_mapped_is_one_line(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "in", "bin")
    source = open_source(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="changed since it was opened"):
        source.load()
