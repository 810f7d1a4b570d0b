"""A compressed stream takes embeddings from outside, and the rows of its own table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import normconvert
from normconvert.sources import open_source
from tests.support.tiny_checkpoints import gpt2, save


def test_embeddings_from_outside_and_from_the_table_are_the_same(tmp_path: Path) -> None:
    source = save(gpt2().double(), tmp_path / "model")
    normconvert.convert(source, tmp_path / "out", "crmsnorm", verify=False)
    original: Any = open_source(str(source)).load(dtype=torch.float64)
    converted: Any = normconvert.load(tmp_path / "out", dtype=torch.float64)
    ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(ids).logits
        outside = original.get_input_embeddings()(ids)
        inside = converted.get_input_embeddings()(ids)
        assert inside.shape[-1] == outside.shape[-1] - 1
        for given in (outside, inside):
            found = converted(inputs_embeds=given).logits
            assert float((found - expected).norm() / expected.norm()) <= 1e-10
        prompt = torch.randn(2, 3, outside.shape[-1], dtype=torch.float64)
        expected = original(inputs_embeds=torch.cat([prompt, outside], 1)).logits
        found = converted(inputs_embeds=torch.cat([prompt, outside], 1)).logits
    assert float((found - expected).norm() / expected.norm()) <= 1e-10
