"""What lies in the files against what the plan makes, tensor by tensor; then the files' model with the exact weights.

A stored weight is right if it is the edited one, rounded once. That is decided for each number by itself: no statistics
and no input can hide a wrong one. With its weights replaced by the edited ones, the model that was loaded from the
files has to be the original's equal in float64: that shows what is no weight, a missing operation or another eps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normconvert.verification.algebra import Seen, named_tensors

ALLOWED = 0.51
"""Units: half of one for the rounding, and a little for a file that is rounded to one dtype and read in another."""
NOISE = 1e-13
"""Of a tensor's largest number: sums of the edits in float64, taken in another order."""
BLOCK = 1 << 18


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
    converted: nn.Module, edited: Callable[[Seen | None], nn.Module], original: nn.Module | None
) -> tuple[Stored, nn.Module]:
    """Give ``converted`` the tensors of the edited model, each after it was compared; the loaded ones are freed.

    Args:
        converted: as it was loaded from the files, in any dtype; in float64 afterwards.
        edited: makes the original in float64 with the plan's edits; calls what it is given with each edited tensor, so
            that the loaded ones can go one by one.
        original: in float64, without the edits; None leaves the comparison out. `edited` may use it up.

    Returns:
        The distance, and the edited model, in the same memory.
    """
    mine = named_tensors(converted)
    # Before anything is edited: it is asked what the original's numbers are.
    kinds = {} if original is None else _kinds_of(converted, named_tensors(original))
    worst, lock = Stored(), threading.Lock()

    def replace(name: str, exact: Tensor) -> None:
        nonlocal worst
        value = mine.get(name)
        if value is None or exact.shape != value.shape or not value.is_floating_point():
            return
        if name in kinds:
            units = _units(value.detach(), exact.detach(), kinds[name])
            with lock:  # the edited tensors come from several threads
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
    return worst, model


def _plain_tensors(converted: nn.Module, edited: nn.Module) -> None:
    """Tensors that modules hold beside their parameters and buffers, in float64 too."""
    others = dict(edited.named_modules())
    for path, module in converted.named_modules():
        for name, value in vars(module).items():
            other = vars(others[path]).get(name) if path in others else None
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.is_floating_point():
                setattr(module, name, other)


def _kinds_of(model: nn.Module, original: Mapping[str, Tensor]) -> dict[str, list[torch.dtype]]:
    """Name of what is compared -> its dtype, and those that it may have in the files: the original's numbers have them.

    Tensors keep their own dtype in the files, and it may be a coarser one than that of the model.
    """
    found: dict[str, list[torch.dtype]] = {}
    tensors = named_tensors(model)
    for name in tensors.keys() & model.state_dict().keys():
        stored, was = tensors[name].dtype, original.get(name)
        if not stored.is_floating_point:
            continue
        found[name] = [stored]
        if was is not None and was.is_floating_point():
            kinds = [kind for kind in (torch.bfloat16, torch.float16, torch.float32) if _coarser(kind, stored)]
            found[name] += [kind for kind in kinds if _is_rounded(was, was, kind)]
    return found


def _coarser(kind: torch.dtype, other: torch.dtype) -> bool:
    return torch.finfo(kind).eps > torch.finfo(other).eps or _smallest(kind) > _smallest(other)


def _smallest(kind: torch.dtype) -> float:
    return torch.finfo(kind).smallest_normal * torch.finfo(kind).eps


def _units(stored: Tensor, exact: Tensor, kinds: Sequence[torch.dtype]) -> float:
    """The largest distance of a stored number from the exact one, in units of the coarsest dtype at that number."""
    dense = stored.layout is exact.layout is torch.strided
    if (dense and stored.data_ptr() == exact.data_ptr()) or _is_rounded(stored, exact, stored.dtype):
        return 0.0
    eps, tiny = max(torch.finfo(kind).eps for kind in kinds), max(map(_smallest, kinds))
    noise = 2.0 * NOISE * float(exact.abs().max()) + tiny
    worst = 0.0
    for a, b in _pieces(stored, exact):
        a = a.double()
        off = (a - b).abs() / (eps * b.abs() + noise)
        # An infinity that both hold is no distance (a bound of a clamp); NaN is an infinite one.
        off = torch.where(a == b, 0.0, off).nan_to_num(nan=math.inf)
        worst = max(worst, float(off.max()))
    return worst


def _is_rounded(stored: Tensor, exact: Tensor, kind: torch.dtype) -> bool:
    """Whether each number is the exact one, rounded to the nearest of ``kind``."""
    return all(torch.equal(b.to(kind).to(a.dtype), a) for a, b in _pieces(stored, exact))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces so small that what is made of one takes the memory of the one before."""
    dense = (tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense() for tensor in tensors)
    return zip(*(tensor.reshape(-1).split(BLOCK) for tensor in dense), strict=True)
