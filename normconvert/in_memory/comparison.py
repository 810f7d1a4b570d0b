"""`verify` of two models in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.in_memory.subject import Subject, subject_of
from normconvert.option_fields import is_model
from normconvert.tracing.probes.choose import floating_dtype
from normconvert.verification.equivalence import STORAGE_UNITS, verify_models
from normconvert.verification.limits import check_limits, judge_limits
from normconvert.verification.rounding import ROUNDING_TOLERANCE

if TYPE_CHECKING:
    from normconvert.verification.fidelity import Fidelity
    from normconvert.verification.requests import Verification


def verify_pair(request: Verification) -> Fidelity:
    """:func:`normconvert.verify` of two models in memory, which stay as they are.

    They may hold other tensors and other modules, as a fused model does: what they return is compared.

    Raises:
        InputError: one of them is a checkpoint, or an option is for checkpoints.
    """
    if not (is_model(request.a) and is_model(request.b)):
        raise InputError("verify compares two checkpoints, or two models in memory: found one of each")
    if request.max_memory is not None or request.device != "cpu" or request.trust_remote_code:
        raise InputError(
            "max_memory, device and trust_remote_code are for checkpoints: models in memory run as they are"
        )
    limits = check_limits(request.limits or {})
    original = subject_of(request.a, request.example_inputs, "a")
    other = subject_of(request.b, request.example_inputs, "b")
    coarser = max(torch.finfo(floating_dtype(subject.model)).eps for subject in (original, other))
    fidelity = verify_models(
        truth=original.in_float64,
        algebra=other.in_float64,
        original=lambda: _in(request.dtype, original, other),
        converted=lambda: _in(request.dtype, other, other),
        probes=original.probes(request.level, request.seed),
        tolerance=limits.get("algebra", STORAGE_UNITS * coarser),
        conditioned="algebra" not in limits,
        rounding_tolerance=limits.get("rounding", ROUNDING_TOLERANCE),
        level=request.level,
        seed=request.seed,
    )
    return judge_limits(fidelity, limits)


def _in(dtype: torch.dtype | None, subject: Subject, other: Subject) -> nn.Module:
    """A copy of the model in ``dtype``, or that of the other one; as it is, if it has that already."""
    wanted = dtype or floating_dtype(other.model)
    return subject.copy() if floating_dtype(subject.model) == wanted else nn.Module.to(subject.copy(), wanted)
