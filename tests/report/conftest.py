"""One converted checkpoint with its report, shared by the tests of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import normconvert
from normconvert.cli import run
from tests.support.tiny_checkpoints import gpt2, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def bert(folder: Path) -> Path:
    """A BERT of which one norm converts and the others stay."""
    from transformers import BertConfig, BertForMaskedLM

    from tests.support.perturb import perturb

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return save(perturb(BertForMaskedLM(config).eval()), folder / "bert")


@pytest.fixture(scope="module")
def reported(bert: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The report of a conversion by the command, and its document."""
    file, document = folder / "bert.html", folder / "bert.json"
    arguments = ["rmsnorm", str(bert), str(folder / "out"), "--report", str(file), "--json", str(document), "-q"]
    assert run(arguments) == 0
    return file, json.loads(document.read_text())


@pytest.fixture(scope="module")
def converted(folder: Path) -> tuple[Path, Path]:
    source = save(gpt2(), folder / "tiny-gpt2")
    normconvert.convert(source, folder / "gpt2-out", verify=False)
    return source, folder / "gpt2-out"
