"""What a model is worth on data, and how far it is from the original: the figures of the report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from normconvert.tuning.compare import blocks_of, divergence, feature_error, label_loss, main_output, outputs_of
from normconvert.tuning.data import Data, all_batches
from normconvert.tuning.processes import Processes
from normconvert.tuning.student import call, move


@dataclass(frozen=True)
class Figures:
    """One model on one data set.

    Attributes:
        examples: how many.
        agreement: share of positions at which the most likely class is the original's.
        kl: mean KL divergence from the original, in nats; None where the outputs are no logits.
        accuracy: share of right labels; None for language models and without labels.
        perplexity: of language models.
        features: block -> |y' - y|² / |y|², its outputs against the original's.
    """

    examples: int
    agreement: float
    kl: float | None
    accuracy: float | None = None
    perplexity: float | None = None
    features: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    teacher: nn.Module,
    data: Data,
    processes: Processes,
    *,
    batch_size: int = 32,
    limit: int | None = 1024,
) -> Figures:
    """The figures of ``model``, which is in eval mode.

    Args:
        model: to be measured.
        teacher: the original, with the same centring.
        data: what on; with labels, accuracy or perplexity is measured too.
        processes: each takes its share of the batches.
        batch_size: examples a batch.
        limit: examples at most.
    """
    blocks = blocks_of(teacher, [name for name, _ in teacher.named_modules() if name])
    totals: dict[str, float] = {}

    def add(key: str, value: float) -> None:
        totals[key] = totals.get(key, 0.0) + value

    scored = False
    with torch.no_grad():
        for batch in all_batches(data, batch_size, limit, processes.rank, processes.world):
            batch = move(batch, processes.device)
            mask = batch.get("attention_mask")
            with outputs_of(teacher, blocks) as wanted:
                name, expected = main_output(call(teacher, batch))
            with outputs_of(model, blocks) as features:
                _, found = main_output(call(model, batch))
            scored = name == "logits" or (found.ndim == 2 and found.shape[-1] > 1)
            size = len(found)
            valid = mask if mask is not None and mask.shape == found.shape[:-1] else found.new_ones(found.shape[:-1])
            add("examples", size)
            add("positions", float(valid.sum()))
            add("same", float(((found.argmax(-1) == expected.argmax(-1)) * valid).sum()))
            if scored:
                add("kl", float(divergence(found, expected, mask)) * size)
            for block in blocks:
                if block in features and block in wanted:
                    add(f"features {block}", float(feature_error(features[block], wanted[block], mask)) * size)
            if data.labelled and data.shifted:
                labels = batch["labels"]
                add("nats", float(label_loss(found, labels, shifted=True, reduction="sum")))
                add("tokens", float((labels[:, 1:] >= 0).sum()))
            elif data.labelled and found.ndim == 2:
                add("right", float((found.argmax(-1) == batch["labels"]).sum()))
    keys = [
        "examples", "positions", "same", "kl", "nats", "tokens", "right", *(f"features {block}" for block in blocks)
    ]  # fmt: skip
    values = [value * processes.world for value in processes.mean([totals.get(key, 0.0) for key in keys])]
    total = dict(zip(keys, values, strict=True))
    n = max(total["examples"], 1)
    return Figures(
        examples=int(total["examples"]),
        agreement=total["same"] / max(total["positions"], 1),
        kl=total["kl"] / n if scored else None,
        accuracy=total["right"] / n if data.labelled and not data.shifted else None,
        perplexity=_exp(total["nats"] / total["tokens"]) if total["tokens"] else None,
        features={block: total[f"features {block}"] / n for block in blocks if total[f"features {block}"]},
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
