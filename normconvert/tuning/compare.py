"""How far the student is from the teacher: the losses it learns by, and the figures people read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from normconvert.tracing.output_paths import named_values, tensors_in

IGNORED = -100
"""A label that does not count."""


def blocks_of(model: nn.Module, norms: Sequence[str]) -> list[str]:
    """Paths of the repeated modules that hold the norms: ``transformer.h.3`` for ``transformer.h.3.ln_1``."""
    found: dict[str, None] = {}
    for path in norms:
        match = re.match(r"(.*?\.\d+)\.", f"{path}.")
        if match and match[1] != path:
            found[match[1]] = None
    return [path for path in found if isinstance(model.get_submodule(path), nn.Module)]


@contextmanager
def outputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, each call of ``model`` fills the mapping with what the modules at ``paths`` return."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = next(_tensors(output), None)
            if value is not None:
                found[path] = value

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in named_values(value) if isinstance(leaf, Tensor))


def main_output(output: Any) -> tuple[str, Tensor]:
    """The output that matters, by name: ``logits`` if there are any, else the first tensor; with its gradient."""
    if isinstance(output, Tensor):
        return "output", output
    if isinstance(output, dict) and isinstance(output.get("logits"), Tensor):
        return "logits", output["logits"]
    first = next((t for t in _tensors(output) if t.is_floating_point()), None)
    if first is None:
        raise ValueError(f"no output to compare among {list(tensors_in(output))}")
    return "output", first


def ranks(name: str, output: Tensor) -> bool:
    """Whether the main output ranks classes, so that a divergence can be taken of it.

    Args:
        name: as :func:`main_output` gives it.
        output: the tensor beside it.
    """
    return name == "logits" or (output.ndim == 2 and output.shape[-1] > 1)


def divergence(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean Kullback-Leibler divergence KL(teacher || student) over positions, in nats; logits (..., classes)."""
    s, t = (F.log_softmax(x.float(), -1) for x in (student, teacher))
    each = (t.exp() * (t - s)).sum(-1)
    if valid is None or valid.shape != each.shape:
        return each.mean()
    return (each * valid).sum() / valid.sum().clamp_min(1)


def feature_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """|s - t|² / |t|² over the tokens that count, the mean over examples: so it is the same in however many parts."""
    s, t = student.float(), teacher.float()
    if valid is not None and valid.shape == s.shape[:-1]:
        s, t = s * valid[..., None], t * valid[..., None]
    error, size = (x.square().flatten(1).sum(1) for x in (s - t, t))
    return (error / size.clamp_min(1e-12)).mean()


def agreement(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> float:
    """Share of positions at which the most likely class is the same."""
    same = (student.argmax(-1) == teacher.argmax(-1)).float()
    if valid is None or valid.shape != same.shape:
        return same.mean().item()
    return ((same * valid).sum() / valid.sum().clamp_min(1)).item()


def label_loss(logits: Tensor, labels: Tensor, *, shifted: bool, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats.

    Args:
        logits: (batch, classes) or (batch, positions, classes).
        labels: int64, (batch,) or (batch, positions); :data:`IGNORED` does not count.
        shifted: position i predicts label i + 1 (language models).
        reduction: as torch's.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction=reduction)
