"""A tiny language model and its conversion, shared by the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

import normconvert
from tests.support.tiny_checkpoints import gpt2, save


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ci")
    source = save(gpt2(n_layer=1), root / "tiny")
    normconvert.convert(source, root / "out", verify=False)
    return source, root / "out"
