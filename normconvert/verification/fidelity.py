"""How far two runs of a model are apart: outputs as named tensors, and the figures made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Fidelity:
    """What the verification found.

    Attributes:
        algebra: ||y'-y|| / ||y||, both sides in float64, at the probe and output where it is largest beside its
            tolerance; inf if the edited side alone is not finite.
        rounding: the converted model's error to the float64 truth in its dtype, divided by the original's own such
            error, errors being pooled over the realistic probes; the worst output's. None if not measured.
        top1: share of positions at which the most likely class is the same, original and converted in the dtype.
        kl: mean Kullback-Leibler divergence from the original's distribution to the converted one's, in nats.
        loss_difference: mean next-token loss on the text probes, converted minus original; None without such probes.
        mean_over_rms: largest |mean|/rms at the input of any converted norm of the converted model.
        moved: way out that the plan lists as shifted -> largest ||y'-y|| / ||y|| of what it returns, in float64.
        worst_module: on failure of the algebra, the first module at which the two models part.
        probes: one row for each probe and output: ``probe``, ``output``, ``algebra``, ``original_error``,
            ``converted_error``, ``left_out`` (the share of the values that is NaN in the truth); or ``probe`` and
            ``skipped`` with the reason.
        tolerance: that the algebra was held against.
        rounding_tolerance: that the rounding was held against.
        passed: whether every figure is within its tolerance.
        reasons: one sentence for each that is not.
        limits: figure -> the limit that the user set (:mod:`normconvert.verification.limits`).
        level: ``quick``, ``standard`` or ``thorough``.
        storage: largest distance of a stored weight from the one that the plan makes, in units of its dtype, of which
            half a one is right; None if there is no plan or the weights were not compared.
        remarks: what a reader of the figures has to know.
    """

    algebra: float
    rounding: float | None
    top1: float
    kl: float
    loss_difference: float | None = None
    mean_over_rms: float | None = None
    moved: dict[str, float] = field(default_factory=dict)
    worst_module: str | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)
    tolerance: float = 1e-10
    rounding_tolerance: float = 3.0
    passed: bool = True
    reasons: list[str] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    level: str = "standard"
    storage: float | None = None
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON-ready data; numbers that JSON lacks (inf, nan) become strings."""
        return {key: _json(value) for key, value in asdict(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return value


def is_shifted(name: str, shifted: frozenset[str] | set[str]) -> bool:
    """Whether an output's per-token mean may change (``hidden_states`` stands for ``hidden_states.3`` too)."""
    return any(name == s or name.startswith(f"{s}.") for s in shifted)


def channel_axes(x: Tensor) -> tuple[int, ...]:
    """The axes that may hold channels: the last, and the second of a feature map (batch, channels, height, width)."""
    return (-1,) if x.ndim < 4 else (-1, 1)


@dataclass(frozen=True)
class Distance:
    """||y' - y|| and ||y||, over the values that y has; ``left_out`` is the share that it has not (NaN)."""

    difference: float
    size: float
    left_out: float = 0.0

    @property
    def relative(self) -> float:
        """||y' - y|| / ||y||; the difference itself where y is zero."""
        return self.difference / self.size if self.size > 0.0 else self.difference


def distance(found: Tensor, expected: Tensor, *, shifted: bool = False) -> Distance:
    """How far `found` is from `expected`, computed in float64.

    What is NaN in `expected` says nothing and is left out. Infinities at the same places count as equal; where only
    one is finite, the distance is inf.

    Args:
        found: any shape and floating dtype.
        expected: likewise.
        shifted: compare after removing the per-token mean over the channels.
    """
    if found.shape != expected.shape:
        return Distance(math.inf, 1.0)
    if shifted and expected.ndim > 0:
        options = [_distance(*(_centered(t, axis) for t in (found, expected))) for axis in channel_axes(expected)]
        return min(options, key=lambda option: option.relative)
    return _distance(found.double(), expected.double())


def _centered(x: Tensor, axis: int) -> Tensor:
    x = x.double()
    return x - x.mean(axis, keepdim=True)


def _distance(found: Tensor, expected: Tensor) -> Distance:
    if bool(torch.isfinite(expected).all()) and bool(torch.isfinite(found).all()):
        return Distance(float((found - expected).norm()), float(expected.norm()))
    # A row that is masked as a whole has a softmax over nothing.
    known = ~torch.isnan(expected)
    left_out = 1.0 - float(known.double().mean())
    found, expected = found[known], expected[known]
    finite = torch.isfinite(expected)
    # An infinity must be the same one: +inf where a mask holds -inf shows what the mask hides.
    if not bool((finite & torch.isfinite(found) | (found == expected)).all()):
        return Distance(math.inf, 1.0, left_out)
    found, expected = found[finite], expected[finite]
    return Distance(float((found - expected).norm()), float(expected.norm()), left_out)


def ratio(converted: float, original: float, eps: float) -> float:
    """The converted model's error over the original's; errors below half a rounding unit count as half a unit.

    Without that floor, an output that the original happens to hit exactly would make any rounding look infinite.
    """
    floor = eps / 4.0  # the unit roundoff is eps / 2
    if converted <= floor:
        return 1.0 if original <= floor else converted / original
    return converted / max(original, floor)


def scores(outputs: Outputs) -> Tensor | None:
    """The output that ranks classes: ``logits`` where there is one, else the first that ranks more than one class."""
    # Before hidden states and the like, which may come first and rank nothing.
    named = [name for name in outputs if name.rsplit(".", 1)[-1].endswith("logits")]
    for name in [*named, *outputs]:
        if outputs[name].ndim >= 2 and outputs[name].shape[-1] > 1:
            return outputs[name]
    return None


def agreement(original: Tensor, converted: Tensor) -> tuple[int, int, float]:
    """(positions that agree on the most likely class, positions, summed KL divergence in nats), over the last axis."""
    # Classes that are masked are -inf, and inf - inf would make the whole divergence NaN.
    known = ~torch.isnan(original).any(-1)
    a, b = (torch.nan_to_num(t[known].double()).log_softmax(-1) for t in (original, converted))
    same = int((a.argmax(-1) == b.argmax(-1)).sum())
    return same, a.shape[0], float((a.exp() * (a - b)).sum())


def next_token_loss(outputs: Outputs, inputs: Mapping[str, Any]) -> float | None:
    """Mean next-token loss in nats; None if there are no logits over the vocabulary for every token."""
    logits = outputs.get("logits")
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if (
        logits is None
        or not isinstance(ids, Tensor)
        or logits.ndim != 3
        or logits.shape[:2] != ids.shape
        or ids.shape[1] < 2
    ):
        return None
    # An id that the head does not rank (a placeholder of an image, say) has no loss.
    if int(ids.max()) >= logits.shape[-1]:
        return None
    flat = logits[:, :-1].double().flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten().to(flat.device)))
