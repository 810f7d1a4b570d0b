"""The loop: the student learns what the teacher says, its old norms fade or go one by one, its streams stay centred."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import NormConvertError
from normconvert.tuning import checkpoints
from normconvert.tuning.compare import (
    agreement,
    blocks_of,
    divergence,
    feature_error,
    label_loss,
    main_output,
    outputs_of,
)
from normconvert.tuning.data.batches import Data, training_batch
from normconvert.tuning.guard import Guard, worst_norm
from normconvert.tuning.norms import FrozenNorm, RepBatchNorm
from normconvert.tuning.processes import Processes
from normconvert.tuning.seats import ROLES
from normconvert.tuning.settings import Settings, share_left
from normconvert.tuning.student import Batch, Student, call, move

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""
REMOVED = 0.5
"""Share of the steps after which nothing of the old norms is left."""
MERGED = 0.55
"""... and after which the first position is treated as all others (ln-free)."""
CLIP = 1.0
"""Largest norm of the gradient."""

Watch = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step: how many are done, of how many, with ``loss``, ``agreement`` and ``mix``."""


class Diverged(NormConvertError):
    """The training went astray; the last good state is kept (exit status 1)."""

    exit_status = 1


@dataclass
class Trace:
    """What a run measured: one row each :attr:`every` steps."""

    every: int
    rows: list[dict[str, float]] = field(default_factory=list)


def apply_schedule(student: Student, settings: Settings, progress: float) -> float:
    """Let the old norms fade or go, as ``progress`` (0 to 1) says; returns the share that is left."""
    left = share_left(settings.schedule, progress, REMOVED)
    going = sorted(student.seats, key=lambda seat: ROLES.index(seat.role))
    gone = len(going) - math.ceil(left * len(going) - 1e-9)
    for i, seat in enumerate(going):
        norm = student.norms[seat.path]
        if isinstance(norm, RepBatchNorm):
            norm.set_mix(left)
        if isinstance(norm, FrozenNorm):
            if i < gone and not norm.frozen:
                norm.freeze()
            if norm.apart and (progress >= MERGED or settings.schedule == "none"):
                norm.merge_first()
            norm.keep_spread = seat.role == "final" and settings.spread_weight > 0
    return left


def train(
    student: Student,
    teacher: nn.Module,
    data: Data,
    settings: Settings,
    processes: Processes,
    folder: Path,
    *,
    resume: bool = False,
    watch: Watch | None = None,
) -> Trace:
    """Train ``student`` in place for ``settings.steps`` steps.

    Args:
        student: calibrated.
        teacher: not changed.
        data: labelled, if the objective is the task.
        settings: checked.
        processes: on whose device both models are.
        folder: of the run's state.
        resume: go on from the state there.
        watch: sees the figures of each step.

    Raises:
        Diverged: the loss is not finite, or the agreement collapses; names the norm that went first.
        InputError: the state cannot be written or read.
    """
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    blocks = blocks_of(teacher, [seat.path for seat in student.seats])
    guard = Guard()
    step, elapsed = 0, 0.0
    if resume:
        state = checkpoints.load(folder)
        student.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = int(state["step"]), float(state["elapsed"])
        guard.load(state["guard"])
    trace = Trace(max(1, settings.steps // 100))
    student.train()
    clock = time.perf_counter()

    def snapshot() -> dict[str, Any]:
        return {
            "model": student.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "elapsed": elapsed + time.perf_counter() - clock,
            "guard": guard.state(),
        }

    def save() -> None:
        if processes.is_main:
            checkpoints.save(folder, settings, snapshot())
        processes.wait()

    if settings.batches_between_checkpoints and not resume:
        save()
    while step < settings.steps:
        progress = step / settings.steps
        if settings.max_minutes is not None:
            spent = processes.mean([elapsed + time.perf_counter() - clock])[0]
            progress = max(progress, spent / 60 / settings.max_minutes)
            if progress >= 1:
                break
        left = apply_schedule(student, settings, progress)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(progress, step, settings.steps)
        optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(2, dtype=torch.float64)
        for part in range(settings.accumulate):
            number = step * settings.accumulate + part
            batch = training_batch(data, number, settings.batch_size, settings.seed, processes.rank, processes.world)
            batch = move(batch, processes.device)
            loss, same = _loss(student, teacher, batch, settings, blocks, data)
            (loss / settings.accumulate).backward()
            figures += torch.tensor([loss.item(), same], dtype=torch.float64) / settings.accumulate
        processes.average_gradients(parameters)
        size = float(nn.utils.clip_grad_norm_(parameters, CLIP))
        loss_now, same_now = processes.mean(figures.tolist())
        reason = guard.look(loss_now, same_now, size)
        if reason:
            with student.masked(batch):
                culprit = worst_norm(student, teacher, batch)
            kept = folder / checkpoints.STATE
            where = f"the last good state is in {folder}" if kept.is_file() else "it had not yet been saved"
            raise Diverged(f"the training went astray at step {step + 1}: {reason}; {culprit} went first; {where}")
        optimizer.step()
        student.project()
        step += 1
        shown = {"loss": loss_now, "agreement": same_now, "mix": left}
        if step % trace.every == 0 or step == settings.steps:
            trace.rows.append({"step": step, **shown})
        if watch is not None:
            watch(step, settings.steps, shown)
        every = settings.batches_between_checkpoints
        if every and step % every == 0 and step < settings.steps:
            save()
    return trace


def _rate(progress: float, step: int, steps: int) -> float:
    """Warm-up, then a cosine from 1 to 0.05."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _loss(
    student: Student, teacher: nn.Module, batch: Batch, settings: Settings, blocks: list[str], data: Data
) -> tuple[Tensor, float]:
    """The loss of one batch, and the agreement with the teacher."""
    device = next(teacher.parameters()).device.type
    low = settings.mixed_precision == "bf16"
    mask = batch.get("attention_mask")
    with student.masked(batch), torch.autocast(device, dtype=torch.bfloat16, enabled=low):
        with torch.no_grad(), outputs_of(teacher, blocks) as wanted:
            name, expected = main_output(call(teacher, batch))
        with outputs_of(student.model, blocks) as features:
            _, found = main_output(call(student.model, batch))
    same = agreement(found.detach(), expected, mask)
    if settings.objective == "task":
        loss = label_loss(found, batch["labels"], shifted=data.shifted)
    else:
        scored = name == "logits" or (found.ndim == 2 and found.shape[-1] > 1)
        loss = divergence(found, expected, mask) if scored else feature_error(found, expected, mask)
        parts = [feature_error(features[b], wanted[b], mask) for b in blocks if b in features and b in wanted]
        if parts:
            loss = loss + settings.feature_weight * torch.stack(parts).mean()
    for norm in student.norms.values():
        if isinstance(norm, FrozenNorm) and norm.spread is not None:
            loss = loss + settings.spread_weight * norm.spread if not norm.frozen else loss
            norm.spread = None
    return loss, same
