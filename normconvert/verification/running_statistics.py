"""A look at the statistics and weights that a plan is about to divide by, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError
from normconvert.files.tensor_info import COUNTER
from normconvert.plan.vectors import Expression

if TYPE_CHECKING:
    from torch import Tensor

    from normconvert.plan.conversion_plan import Plan


def check_statistics(
    plan: Plan, reference: str, read: Callable[[str], Tensor], origins: Mapping[str, str]
) -> list[str]:
    """Refuse statistics that cannot be right, and name those that look as if nobody had learnt them.

    A norm's weight that its bias is divided by must have no zeros but where the bias is zero as well.

    Args:
        plan: of the conversion.
        reference: what is converted, for errors.
        read: model name -> the original tensor.
        origins: model name -> the name that the user knows it by.

    Returns:
        Sentences for the user.

    Raises:
        InputError: a running variance or mean is NaN or infinite, or a variance is negative; or a weight is zero that a
            bias is to be divided by.
    """
    import torch

    dead, fresh = [], []
    for name in variances(plan):
        value = read(name)
        bad = ~(value.isfinite() & (value >= 0))
        if bool(bad.any()):
            worst = value[bad][0].item()
            raise InputError(
                f"{reference}: tensor {origins[name]} holds {worst:.3g} ({int(bad.sum())} of {value.numel()} "
                "values): expected running variances, finite and not negative: train or download the model again"
            )
        if bool((value == 0).any()):
            # Zero is legal: a channel that never fires has no variance. Trained models have such channels, so it is
            # only said.
            dead.append(f"{origins[name]} ({int((value == 0).sum())} of {value.numel()})")
    for name in plan.removed:
        if name.endswith(COUNTER) and name in origins and int(read(name)) == 0:
            fresh.append(name.removesuffix(f".{COUNTER}"))
    for bias, (name, offset) in divisors(plan).items():
        weight, divided = read(name).double() + offset, read(bias).double()
        bad = (weight == 0) & (divided.reshape(weight.shape) != 0)
        if plan.method == "rotate":  # all channels would take a share of the quotient, and round by it
            bad |= divided.abs().reshape(weight.shape) * torch.finfo(read(name).dtype).eps > weight.abs()
        if count := int(bad.sum()):
            size = "zero" if bool((weight[bad] == 0).all()) else "zero, or almost,"
            way = "`--keep` can leave that norm as it is" if plan.method == "fold" else "its stream cannot be rotated"
            raise InputError(
                f"{reference}: tensor {origins[name]} {f'+ {offset:g} ' if offset else ''}is {size} in {count} of "
                f"{weight.numel()} channels: the norm's bias stays, as what reads it has none, and cannot be divided "
                f"by it: {way}"
            )
    notes = []
    if dead:
        notes.append(f"running variances that are zero, as dead channels have (fused as they are): {_some(dead)}")
    if fresh:
        notes.append(
            f"statistics that were never updated ({COUNTER} is 0), as in a model that was not trained: {_some(fresh)}"
        )
    return notes


def variances(plan: Plan) -> list[str]:
    """Names of the tensors under a root: v in 1 / sqrt(v + eps)."""
    found: dict[str, None] = {}
    for rows in plan.tensors.values():
        for row in rows:
            found.update(dict.fromkeys(_under_roots(row.get("by", 0))))
    return list(found)


def divisors(plan: Plan) -> dict[str, tuple[str, float]]:
    """Bias of a norm -> the weight that it is divided by, and what is added to that first."""
    found = {}
    for divided, rows in plan.tensors.items():
        for row in rows:
            if row["op"] == "divide":
                by = row["by"]
                found[divided] = (by, 0.0) if isinstance(by, str) else (by[1], float(by[2]))
    return found


def _under_roots(expression: Expression) -> Iterator[str]:
    if isinstance(expression, list):
        operand: Any = expression[1]
        if expression[0] == "rsqrt" and isinstance(operand, list) and operand[0] == "add":
            yield from (name for name in operand[1:] if isinstance(name, str))
        for inner in expression[1:]:
            yield from _under_roots(inner)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
