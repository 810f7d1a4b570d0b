"""Adapters of small models, made and run by PEFT, with every tensor random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH = {"input_ids": torch.arange(14).reshape(2, 7) % 50 + 3, "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
BATCH["attention_mask"][0, 5:] = 0


def float64_checkpoint(model: nn.Module, folder: Path) -> Path:
    """Saved in float64, so that a checkpoint, its conversion and an adapter compare to 1e-10."""
    saver: Any = model.double()
    saver.save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    """As transformers loads it without normconvert."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def train(folder: Path, out: Path, config: Any) -> Path:
    """An adapter of a checkpoint as if it had been trained: all that it may train is random."""
    from peft import get_peft_model

    model: Any = get_peft_model(stock(folder), config).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                # Around what is there where that is no zero: magnitudes and norms stay positive.
                p.copy_(p + 0.3 * noise * (p.abs().mean() + 0.1))
    model.save_pretrained(out)
    return out


def logits(base: Any, adapter: Path) -> Tensor:
    """Of the model with the adapter, by PEFT, on a padded batch."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base, adapter).double().eval()
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The relative error."""
    return float((found - expected).norm() / expected.norm())
