"""When a training has gone astray, and which norm went first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from normconvert.tuning.compare import outputs_of
from normconvert.tuning.student import Batch, Student, call

KEEP = 0.95
"""Of the running averages."""
COLLAPSE = 0.25
"""A running agreement below this share of its best is a collapse ..."""
PATIENCE = 20
"""... if it stays there for so many steps."""
GROWTH = 100.0
"""A loss this many times the running one is divergence, too, if it stays."""
LEAST = 0.1
"""The running loss is taken for no less: where the old norms fade or go, the training begins with a loss of nothing."""
BROKEN = 1.0
"""A norm whose output is this far from the teacher's, relative to it, is broken."""


class Guard:
    """Looks at each step's figures."""

    def __init__(self) -> None:
        self.best = self.running = 0.0
        self.loss = math.nan
        self.low = self.seen = 0

    def look(self, loss: float, agreement: float, gradient: float) -> str:
        """Why to stop, in one clause; empty: go on."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient):
            return "the gradient is not finite"
        self.seen += 1
        self.running = agreement if self.seen == 1 else KEEP * self.running + (1 - KEEP) * agreement
        self.best = max(self.best, self.running)
        exploded = not math.isnan(self.loss) and loss > GROWTH * max(self.loss, LEAST)
        # An explosion must not enter the running loss: the next loss would look quite normal beside it.
        if not exploded:
            self.loss = loss if math.isnan(self.loss) else KEEP * self.loss + (1 - KEEP) * loss
        collapsed = self.running < COLLAPSE * self.best
        self.low = self.low + 1 if collapsed or exploded else 0
        if self.low < PATIENCE:
            return ""
        if collapsed:
            return f"the agreement with the original fell from {self.best:.1%} to {self.running:.1%}"
        return f"the loss rose from {self.loss:.3g} to {loss:.3g}"

    def state(self) -> dict[str, Any]:
        """To be saved."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        vars(self).update(state)


def worst_part(student: Student, teacher: nn.Module, batch: Batch) -> str:
    """The first norm whose output is not finite or far from the teacher's, then the first attention; else the farthest.

    Both in execution order.
    """
    kinds = {**dict.fromkeys(student.norms, "norm"), **dict.fromkeys(student.attentions, "attention")}
    paths = list(kinds)
    with torch.no_grad():
        with outputs_of(teacher, paths) as wanted:
            call(teacher, batch)
        with outputs_of(student.model, paths) as found:
            call(student.model, batch)
    errors = {}
    for path in paths:
        if path not in found or path not in wanted:
            continue
        s, t = found[path].double(), wanted[path].double()
        error = float((s - t).norm() / t.norm().clamp_min(1e-12))
        if not math.isfinite(error) or error > BROKEN:
            return f"the {kinds[path]} `{path}` (its output is {error:.3g} of the original's away from it)"
        errors[path] = error
    if not errors:
        return "no norm"
    worst = max(errors, key=errors.__getitem__)
    return f"the {kinds[worst]} `{worst}` (its output is {errors[worst]:.3g} of the original's away from it)"
