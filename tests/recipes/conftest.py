"""A working directory with one checkpoint, for batches to be run in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tiny_checkpoints import gpt2, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt2(n_layer=1, n_embd=24), tmp_path_factory.mktemp("recipes") / "model")


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one checkpoint."""
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path
