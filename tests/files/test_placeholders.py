"""Checkpoints of Lightning: the weights are read whatever objects lie beside them, and no code of theirs runs."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.files.pickle_file import read_pickle, read_pickle_entries

RAN: list[str] = []
STATE = {"weight": torch.arange(6.0)}


def runs(*args: Any) -> str:
    RAN.append("ran")
    return "made"


class Attributes(dict[str, Any]):
    """Filled item by item, as Lightning's own AttributeDict."""


class Reduced:
    """Made by calling a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return runs, ("touch",)


class Slots:
    """Keeps its state elsewhere."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes live in a module that is gone when the file is read."""
    module = types.ModuleType("somebodys_program")
    for found in (Attributes, Reduced, Slots, runs):
        setattr(module, found.__name__, found)
        monkeypatch.setattr(found, "__module__", "somebodys_program")
    monkeypatch.setitem(sys.modules, "somebodys_program", module)


def save(path: Path, **entries: Any) -> Path:
    torch.save({"state_dict": STATE, **entries}, path)
    sys.modules.pop("somebodys_program", None)
    RAN.clear()
    return path


OBJECTS: dict[str, Any] = {
    "items": lambda: Attributes(lr=1e-3, layers=[1, 2]),
    "reduced": Reduced,
    "slots": Slots,
    "partial": lambda: functools.partial(torch.optim.AdamW, lr=1e-3),
    "module": lambda: nn.CrossEntropyLoss(),
    "all": lambda: Attributes(a=Reduced(), b=[Slots()], c=functools.partial(runs, 3), d=Path("x"), e=nn.Linear(2, 2)),
}


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("kind", OBJECTS)
def test_weights_beside_objects_are_read_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    made = OBJECTS[kind]()
    path = save(tmp_path / "last.ckpt", hyper_parameters=made, **{"pytorch-lightning_version": "2.5.0"})
    found = read_pickle(path)
    assert torch.equal(found.tensors["weight"], STATE["weight"])
    assert any("were not loaded, and none of their code" in note for note in found.notes)
    read_pickle_entries(path)
    assert not RAN


@pytest.mark.usefixtures("program")
def test_other_pickles_with_objects_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", hyper_parameters=Reduced())
    with pytest.raises(InputError, match=r"this pickle wants to run code \(somebodys_program\.runs\)"):
        read_pickle(path)
    assert not RAN


@pytest.mark.usefixtures("program")
def test_weights_that_an_object_makes_are_not_made_up(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Reduced(), "pytorch-lightning_version": "2.5.0"}, path)
    with pytest.raises(InputError, match="holds no tensors"):
        read_pickle(path)
