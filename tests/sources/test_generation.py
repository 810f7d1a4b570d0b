"""What users feel: a converted language model writes the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import normconvert
from normconvert.sources import open_source

GREEDY = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "pad_token_id": 0}


def test_greedy_text_is_the_same_over_200_tokens_in_float32(tmp_path: Path) -> None:
    normconvert.convert("demo:gpt2", tmp_path / "out", verify=False)
    source = open_source("demo:gpt2")
    original = source.load(dtype=torch.float32)
    converted = normconvert.load(tmp_path / "out", dtype=torch.float32)
    assert sum(type(m).__name__ == "RMSNorm" for m in converted.modules()) == 9
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    for prompt in ("And God said,", "In the beginning", "Blessed are they"):
        inputs = tokenizer(prompt, return_tensors="pt")
        texts = [
            model.generate(**inputs, **GREEDY)  # type: ignore[operator]
            for model in (original, converted)
        ]
        assert texts[0].shape[1] == inputs["input_ids"].shape[1] + 200
        assert torch.equal(texts[0], texts[1]), prompt


@pytest.mark.slow
def test_a_folded_model_writes_the_same_text_too(tmp_path: Path) -> None:
    report = normconvert.convert("demo:gpt2", tmp_path / "out", fold=True)
    assert report.fidelity is not None
    assert report.fidelity.passed
    converted = normconvert.load(tmp_path / "out")
    blocks = [m for name, m in converted.named_modules() if type(m).__name__ == "RMSNorm" and "ln_f" not in name]
    assert len(blocks) == 8
    assert all(bool((m.weight == 1).all()) and bool((m.bias == 0).all()) for m in blocks)
