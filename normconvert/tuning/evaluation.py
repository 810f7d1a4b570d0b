"""What a model is worth on data, and how far it is from the original: the figures of the report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from normconvert.tuning.compare import (
    blocks_of,
    divergence,
    feature_error,
    label_loss,
    main_output,
    outputs_of,
    ranks,
)
from normconvert.tuning.data import Data, all_batches
from normconvert.tuning.processes import Processes
from normconvert.tuning.student import Batch, call, move


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
    here: dict[str, float] = defaultdict(float)
    with torch.no_grad():
        for batch in all_batches(data, batch_size, limit, processes.rank, processes.world):
            for key, value in _sums(model, teacher, move(batch, processes.device), data, blocks).items():
                here[key] += value
    return _figures(_over_processes(here, blocks, processes), data, blocks, scored="kl" in here)


def _sums(model: nn.Module, teacher: nn.Module, batch: Batch, data: Data, blocks: list[str]) -> dict[str, float]:
    """What one batch adds to the totals."""
    mask = batch.get("attention_mask")
    with outputs_of(teacher, blocks) as wanted:
        name, expected = main_output(call(teacher, batch))
    with outputs_of(model, blocks) as features:
        _, found = main_output(call(model, batch))
    size = len(found)
    valid = mask if mask is not None and mask.shape == found.shape[:-1] else found.new_ones(found.shape[:-1])
    sums = {
        "examples": size,
        "positions": float(valid.sum()),
        "same": float(((found.argmax(-1) == expected.argmax(-1)) * valid).sum()),
    }
    if ranks(name, found):
        sums["kl"] = float(divergence(found, expected, mask)) * size
    for block in blocks:
        if block in features and block in wanted:
            sums[_feature(block)] = float(feature_error(features[block], wanted[block], mask)) * size
    if data.labelled and data.shifted:
        labels = batch["labels"]
        # Nats and tokens apart: batches hold different numbers of tokens, and perplexity is a mean over all of them.
        sums["nats"] = float(label_loss(found, labels, shifted=True, reduction="sum"))
        sums["tokens"] = float((labels[:, 1:] >= 0).sum())
    elif data.labelled and found.ndim == 2:
        sums["right"] = float((found.argmax(-1) == batch["labels"]).sum())
    return sums


def _feature(block: str) -> str:
    return f"features {block}"


def _over_processes(here: Mapping[str, float], blocks: list[str], processes: Processes) -> dict[str, float]:
    """The totals of all processes."""
    # All keys, whatever this process has seen: the processes add up the numbers by their places in the list.
    keys = ["examples", "positions", "same", "kl", "nats", "tokens", "right", *map(_feature, blocks)]
    means = processes.mean([here.get(key, 0.0) for key in keys])
    return {key: value * processes.world for key, value in zip(keys, means, strict=True)}


def _figures(total: Mapping[str, float], data: Data, blocks: list[str], *, scored: bool) -> Figures:
    n = max(total["examples"], 1)
    return Figures(
        examples=int(total["examples"]),
        agreement=total["same"] / max(total["positions"], 1),
        kl=total["kl"] / n if scored else None,
        accuracy=total["right"] / n if data.labelled and not data.shifted else None,
        perplexity=_exp(total["nats"] / total["tokens"]) if total["tokens"] else None,
        features={block: total[_feature(block)] / n for block in blocks if total[_feature(block)]},
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
