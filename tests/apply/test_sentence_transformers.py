"""A folder of sentence-transformers: a model of transformers, and modules behind it that read what its doors give."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

from normconvert import convert
from tests.support.perturb import perturb

# The lowest version has them at an older place, of which the newest warns.
PLACE = "sentence_transformer.modules" if find_spec("sentence_transformers.sentence_transformer") else "models"
MODULES: Any = import_module(f"sentence_transformers.{PLACE}")
Dense, Pooling, Transformer = MODULES.Dense, MODULES.Pooling, MODULES.Transformer
SENTENCES = ["a b c", "d e f g h i", "q"]


def _base(folder: Path, kind: type) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model: Any = perturb(kind(config).eval())
    model.save_pretrained(folder)
    words = ["[UNK]", "[PAD]", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def _sentences(folder: Path, *modules: torch.nn.Module) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(str(folder)), *modules], device="cpu")


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
def test_sentences_have_the_same_vectors(tmp_path: Path, method: str) -> None:
    base = _base(tmp_path / "base", GPT2Model)
    model = _sentences(base, Pooling(32, "mean"), Dense(32, 16))
    model.save(str(tmp_path / "a"))
    report = convert(tmp_path / "a", tmp_path / "b", method=method)
    assert report.plan.converted
    # The weights of the modules behind the model are copied as they are.
    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "b" / dense).read_bytes() == (tmp_path / "a" / dense).read_bytes()
    found = SentenceTransformer(str(tmp_path / "b"), trust_remote_code=True, device="cpu")
    assert {"RMSNorm", "CRMSNorm"} & {type(module).__name__ for module in found.modules()}
    np.testing.assert_allclose(found.encode(SENTENCES), model.encode(SENTENCES), atol=2e-5)


def test_a_model_with_a_head_is_opened_without_it(tmp_path: Path) -> None:
    """sentence-transformers opens the base class, which is another than the one that was converted."""
    base = _base(tmp_path / "a", GPT2LMHeadModel)
    report = convert(base, tmp_path / "b")
    assert report.plan.converted
    expected = _sentences(base, Pooling(32, "mean")).encode(SENTENCES)
    plain = _sentences(tmp_path / "b", Pooling(32, "mean")).encode(SENTENCES)
    np.testing.assert_allclose(plain, expected, atol=2e-5)
