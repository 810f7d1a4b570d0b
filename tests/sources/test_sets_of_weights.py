"""Of several sets of weights in one file one is taken, and said; files that hold none are called what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import normconvert
from normconvert.errors import InputError
from normconvert.sources import open_source
from tests.support.bare_weights import UNIQUE, state_of, write

SETS = [
    ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("params", "params_ema"), ("student", "teacher"),
    ("net", "ema"), ("model_state_dict", "ema_state_dict"), ("model", "ema_model"), ("g", "g_ema"),
    ("state_dict", "swa_state_dict"), ("network", "averaged_model"),
]  # fmt: skip


@pytest.mark.parametrize(("trained", "averaged"), SETS)
def test_which_of_two_sets_of_weights_is_taken_is_said_and_can_be_chosen(
    tmp_path: Path, trained: str, averaged: str
) -> None:
    a, b, file = state_of(UNIQUE), state_of(UNIQUE), tmp_path / "last.ckpt"
    torch.save({trained: a, averaged: {f"module.{n}": v for n, v in b.items()}, "epoch": 3}, file)
    for chosen, expected in ((None, b), ("ema", b), ("model", a)):
        source = open_source(str(file), weights=chosen)
        loaded = source.load().state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
        taken, other = (trained, averaged) if chosen == "model" else (averaged, trained)
        assert any(f"{taken} (" in note and note.endswith(f"takes {other}") for note in source.notes)


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "net", "params_ema", "teacher", "network", "module", "x"]
)
@pytest.mark.parametrize("suffix", [".ckpt", ".pyth", ".th", ".pt.tar"])
def test_one_set_of_weights_is_found_by_any_of_its_names(tmp_path: Path, key: str, suffix: str) -> None:
    state, file = state_of(UNIQUE), tmp_path / f"last{suffix}"
    beside = {"optimizer": {"state": {"a.b": torch.ones(3)}}, "rng": {"cpu": torch.ones(3)}, "step": torch.tensor(3)}
    torch.save({key: state, **beside}, file)
    loaded = open_source(str(file)).load().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_an_average_that_a_callback_keeps_is_found(tmp_path: Path) -> None:
    a, b, file = state_of(UNIQUE), state_of(UNIQUE), tmp_path / "last.ckpt"
    torch.save({"state_dict": a, "callbacks": {"WeightAveraging": {"ema_weights": b}}}, file)
    for chosen, expected in ((None, b), ("model", a)):
        loaded = open_source(str(file), weights=chosen).load().state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_of_sets_under_names_of_nobody_none_is_taken(tmp_path: Path) -> None:
    torch.save({"generator": state_of(UNIQUE), "discriminator": state_of("test_resnet")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds 2 sets of tensors \(generator, discriminator\): save the one"):
        open_source(str(tmp_path / "w.pth"))
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="expected a state dict, found dict of epoch, lr"):
        open_source(str(tmp_path / "w.pth"))


def test_numbers_and_paths_of_other_libraries_are_no_reason_to_refuse(tmp_path: Path) -> None:
    import numpy

    state = state_of(UNIQUE)
    torch.save({"model": state, "best": numpy.float64(0.3), "log": Path("x")}, tmp_path / "w.pth")
    source = open_source(str(tmp_path / "w.pth"))
    loaded = source.load().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert any("objects in it (numpy." in note and "none of their code" in note for note in source.notes)
    torch.save({"model": {name: value.numpy() for name, value in state.items()}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds no tensors.*numpy.* were not loaded"):
        open_source(str(tmp_path / "w.pth"))


def test_programs_are_called_what_they_are(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    torch.jit.script(model).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(model, (torch.ones(2, 3),)), tmp_path / "exported.pt2")
    (tmp_path / "exported.pt2").rename(tmp_path / "exported.pt")
    for name, what in (("script.pt", "a TorchScript program"), ("exported.pt", "an exported program")):
        with pytest.raises(InputError, match=rf"{what}.*, not a state dict: save the state_dict\(\)"):
            open_source(str(tmp_path / name))


def test_a_set_that_is_not_there_is_not_replaced_by_another(tmp_path: Path) -> None:
    torch.save({"state_dict": state_of(UNIQUE)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"--weights ema: it holds no averaged weights .*: found state_dict"):
        open_source(str(tmp_path / "w.pth"), weights="ema")
    torch.save({"model_ema": state_of(UNIQUE)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="--weights model: it holds no trained weights"):
        open_source(str(tmp_path / "w.pth"), weights="model")
    file = write(state_of(UNIQUE), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="--weights ema: a safetensors file holds one set of weights"):
        open_source(str(file), weights="ema")


def test_the_chosen_set_is_what_verify_and_check_take(tmp_path: Path) -> None:
    torch.save({"state_dict": state_of(UNIQUE), "state_dict_ema": state_of(UNIQUE)}, tmp_path / "w.pth")
    report = normconvert.convert(tmp_path / "w.pth", tmp_path / "out", weights="model")
    assert report.options["weights"] == "model"
    assert normconvert.verify(tmp_path / "w.pth", tmp_path / "out").passed
    assert normconvert.check(tmp_path / "out", tmp_path / "w.pth").passed
