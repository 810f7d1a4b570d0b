"""A tiny language model with 64 positions, and its conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

import normconvert
from tests.support.tiny_checkpoints import gpt2, save


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny language model with 64 positions, and its conversion."""
    folder = tmp_path_factory.mktemp("bench")
    source = save(gpt2(n_positions=64), folder / "src")
    normconvert.convert(source, folder / "out", verify=False)
    return source, folder / "out"
