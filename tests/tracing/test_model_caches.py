"""Memoised values of model code: tensors go, around every run on fake tensors, and everything else stays."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.tracing import model_caches
from normconvert.tracing.model_caches import fresh_caches


@pytest.fixture(autouse=True)
def searched_again() -> None:
    """What a test memoises is found although no module was loaded for it."""
    model_caches._memoised.cache_clear()


@pytest.fixture
def memoised(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], Any]:
    """Memoises a function as if it stood in a module of the given name."""

    def make(module: str, function: Callable[..., Any]) -> Any:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        function.__module__ = module
        return functools.lru_cache(maxsize=None)(function)

    return make


@pytest.mark.parametrize("module", ["retnet", "torchvision_like.ops", "numpy_models", "normconverter", "typing_extras"])
def test_tables_of_a_package_whose_name_begins_like_another_are_emptied(module: str, memoised: Any) -> None:
    table = memoised(module, lambda n: torch.zeros(n))
    table(3)
    with fresh_caches(nn.Linear(2, 2)):
        assert table.cache_info().currsize == 0
        table(3)
    assert table.cache_info().currsize == 0


class Holder:
    """An object with a tensor."""

    def __init__(self) -> None:
        self.parts = {"table": [torch.zeros(2)]}


def _closed_over() -> Callable[[], Tensor]:
    table = torch.zeros(2)
    return lambda: table


@pytest.mark.parametrize("make", [lambda n: (n, {"a": torch.zeros(2)}), lambda n: Holder(), lambda n: _closed_over()])
def test_a_tensor_that_hangs_on_a_memoised_result_is_found(make: Callable[..., Any], memoised: Any) -> None:
    table = memoised("models.tables", make)
    table(3)
    with fresh_caches(nn.Linear(2, 2)):
        assert table.cache_info().currsize == 0


def test_what_a_caller_has_memoised_stays() -> None:
    @functools.lru_cache(maxsize=8)
    def words(n: int) -> list[str]:
        return ["a"] * n

    @functools.lru_cache(maxsize=8)
    def model(name: str) -> nn.Module:
        return nn.Linear(2, 2)

    kept = words(3), model("a")
    with fresh_caches(nn.Linear(2, 2)):
        assert words(3) is kept[0]
    assert words(3) is kept[0]
    assert model("a") is kept[1]


def test_what_is_memoised_in_a_new_cell_of_a_notebook_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_caches(nn.Linear(2, 2)):
        pass
    table = functools.lru_cache(maxsize=None)(lambda n: torch.zeros(n))
    monkeypatch.setattr(sys.modules["__main__"], "table_of_this_test", table, raising=False)
    table(3)
    with fresh_caches(nn.Linear(2, 2)):
        assert table.cache_info().currsize == 0


def test_what_a_server_has_frozen_is_found(memoised: Any) -> None:
    table = memoised("models.frozen", lambda n: torch.zeros(n))
    table(3)
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        with fresh_caches(nn.Linear(2, 2)):
            assert table.cache_info().currsize == 0
        assert gc.get_freeze_count() > before
    finally:
        if not before:
            gc.unfreeze()
