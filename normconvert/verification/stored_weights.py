"""What lies in the files against what the plan makes, tensor by tensor; then the files' model with the exact weights.

A stored weight is right if it is the edited one, rounded once. That is decided for each number by itself: no statistics
and no input can hide a wrong one. With its weights replaced by the edited ones, the model that was loaded from the
files has to be the original's equal in float64: that shows what is no weight, a missing operation or another eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normconvert.verification.probe_runs import named_tensors

ALLOWED = 0.51
"""Units: half of one for the rounding, and a little for a file that is rounded to one dtype and read in another."""
NOISE = 1e-13
"""Of a tensor's largest number: sums of the edits in float64, taken in another order."""
BLOCK = 1 << 22

Made = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Stored:
    """How far the stored weights are from the edited ones.

    Attributes:
        units: the largest distance, in units of the stored dtype; half a unit is right.
        tensor: where.
    """

    units: float = 0.0
    tensor: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every weight is the edited one, rounded."""
        return self.units <= ALLOWED


def with_exact_weights(
    converted: nn.Module, edited: Callable[[Made | None], nn.Module], original: nn.Module | None
) -> Stored:
    """Give ``converted`` the tensors of the edited model, each after it was compared; the loaded ones are freed.

    Args:
        converted: as it was loaded from the files, in any dtype; in float64 afterwards.
        edited: makes the original in float64 with the plan's edits; calls what it is given with each edited tensor, so
            that the loaded ones can go one by one.
        original: in float64, without the edits; None leaves the comparison out.
    """
    mine, stored = named_tensors(converted), set(converted.state_dict())
    before = named_tensors(original) if original is not None else {}
    worst = Stored()

    def replace(name: str, exact: Tensor) -> None:
        nonlocal worst
        value = mine.get(name)
        if value is None or exact.shape != value.shape or not value.is_floating_point():
            return
        if original is not None and name in stored:
            units = _units(value.detach(), exact.detach(), before.get(name))
            if not units <= worst.units:
                worst = Stored(units, name)
        value.data = exact.data

    model = edited(replace)
    theirs = named_tensors(model)
    for name, value in mine.items():
        if name in theirs:
            replace(name, theirs[name])
        if value.is_floating_point():
            value.data = value.data.double()
    _plain_tensors(converted, model)
    return worst


def _plain_tensors(converted: nn.Module, edited: nn.Module) -> None:
    """Tensors that modules hold beside their parameters and buffers, in float64 too."""
    others = dict(edited.named_modules())
    for path, module in converted.named_modules():
        for name, value in vars(module).items():
            other = vars(others[path]).get(name) if path in others else None
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.is_floating_point():
                setattr(module, name, other)


def _units(stored: Tensor, exact: Tensor, original: Tensor | None) -> float:
    """The largest distance of a stored number from the exact one, in units of the stored dtype at that number."""
    if stored.data_ptr() == exact.data_ptr() or torch.equal(exact.to(stored.dtype), stored):
        return 0.0
    kinds = [stored.dtype]
    if original is not None:
        # Tensors keep their own dtype in the files, and it may be a coarser one than that of the model.
        coarser = [torch.bfloat16, torch.float16, torch.float32]
        kinds += [kind for kind in coarser if torch.equal(original.to(kind).double(), original)]
    eps = max(torch.finfo(kind).eps for kind in kinds)
    tiny = max(torch.finfo(kind).smallest_normal * torch.finfo(kind).eps for kind in kinds)
    noise = 2.0 * NOISE * float(exact.abs().max()) + tiny
    worst = 0.0
    for a, b in zip(stored.reshape(-1).split(BLOCK), exact.reshape(-1).split(BLOCK), strict=True):
        a = a.double()
        off = (a - b).abs() / (eps * b.abs() + noise)
        # An infinity that both hold is no distance (a bound of a clamp); NaN is an infinite one.
        off = torch.where(a == b, 0.0, off).nan_to_num(nan=math.inf)
        worst = max(worst, float(off.max()))
    return worst
