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
    ranks,
)
from normconvert.tuning.data.batches import Data, training_batch
from normconvert.tuning.guard import Guard, worst_part
from normconvert.tuning.norms import FrozenNorm, RepBatchNorm
from normconvert.tuning.processes import Processes
from normconvert.tuning.settings import PROGRESSIVE, Settings, share_left
from normconvert.tuning.sites import ROLES
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
    """What a run measured: one row each :attr:`every` steps; and how many there were, those before a resumption too."""

    every: int
    steps: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)


def apply_schedule(student: Student, settings: Settings, progress: float) -> float:
    """Let the old norms fade or go, as ``progress`` (0 to 1) says; returns the share that is left."""
    left = share_left(settings.schedule, progress, REMOVED)
    softmax = attention_left(settings, progress) if student.attentions else 0.0
    for attention in student.attentions.values():
        attention.set_mix(softmax)
    going = sorted(student.sites, key=lambda site: ROLES.index(site.role))
    gone = len(going) - math.ceil(left * len(going) - 1e-9)
    for i, site in enumerate(going):
        norm = student.norms[site.path]
        if isinstance(norm, RepBatchNorm):
            norm.set_mix(left)
        if isinstance(norm, FrozenNorm):
            if i < gone and not norm.frozen:
                norm.freeze()
            if norm.apart and (progress >= MERGED or settings.schedule == "none"):
                norm.merge_first()
            norm.keep_spread = site.role == "final" and settings.spread_weight > 0
    return max(left if student.sites else 0.0, softmax)


def attention_left(settings: Settings, progress: float) -> float:
    """λ of attention: 1 while each layer's linear attention learns by itself, then as the schedule says."""
    if progress < settings.matching:
        return 1.0
    return share_left(settings.schedule, progress - settings.matching, REMOVED - min(settings.matching, REMOVED / 2))


@dataclass(frozen=True)
class Lesson:
    """Who learns what from whom; the same in all steps.

    Attributes:
        student, teacher: on the processes' device.
        data: what to learn from.
        settings: checked.
        processes: on whose device both models are.
        blocks: paths of the modules whose outputs are compared.
        parameters: the student's that are trained.
    """

    student: Student
    teacher: nn.Module
    data: Data
    settings: Settings
    processes: Processes
    blocks: list[str]
    parameters: list[nn.Parameter]


@dataclass(frozen=True)
class Measured:
    """One step before it is taken: the means over all processes, the gradient's norm, this process's last batch."""

    loss: float
    agreement: float
    gradient: float
    batch: Batch


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
    blocks = blocks_of(teacher, [*(site.path for site in student.sites), *student.attentions])
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    lesson = Lesson(student, teacher, data, settings, processes, blocks, parameters)
    run = _Run(lesson, folder)
    trace = Trace(max(1, settings.steps // 100))
    if resume:
        run.resume()
    student.train()
    run.start_clock()
    # A training that goes astray before the first interval is over still has a good state to go back to: the start.
    if settings.batches_between_checkpoints and not resume:
        run.save()
    while (progress := run.progress()) < 1:
        left = apply_schedule(student, settings, progress)
        measured = run.measure(progress)
        run.refuse_if_astray(measured)
        run.take_step()
        shown = {"loss": measured.loss, "agreement": measured.agreement, "mix": left}
        if run.step % trace.every == 0 or run.step == settings.steps:
            trace.rows.append({"step": run.step, **shown})
        if watch is not None:
            watch(run.step, settings.steps, shown)
        if run.is_checkpoint():
            run.save()
    # A result that is refused for its tails is not lost: the training ends at once if it is resumed.
    if settings.guard_tails is not None:
        run.save()
    trace.steps = run.step
    return trace


class _Run:
    """What changes from step to step, and is restored when an interrupted training goes on."""

    def __init__(self, lesson: Lesson, folder: Path) -> None:
        self.lesson, self.folder = lesson, folder
        self.optimizer = torch.optim.AdamW(
            lesson.parameters, lr=lesson.settings.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.guard = Guard()
        self.step = 0
        self.elapsed = 0.0  # seconds, before the clock was started
        self.clock = time.perf_counter()

    def start_clock(self) -> None:
        """From here on time counts as training."""
        self.clock = time.perf_counter()

    def resume(self) -> None:
        """Go on from the state in the folder."""
        state = checkpoints.load(self.folder)
        self.lesson.student.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
        self.guard.load(state["guard"])

    def save(self) -> None:
        """Keep the state in the folder; all processes wait for it."""
        if self.lesson.processes.is_main:
            state: dict[str, Any] = {
                "model": self.lesson.student.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "elapsed": self._spent(),
                "guard": self.guard.state(),
            }
            checkpoints.save(self.folder, self.lesson.settings, state)
        self.lesson.processes.wait()

    def is_checkpoint(self) -> bool:
        """Whether the state is kept after this step; not after the last, whose result is written at once."""
        settings = self.lesson.settings
        every = settings.batches_between_checkpoints
        return bool(every) and self.step % every == 0 and self.step < settings.steps

    def progress(self) -> float:
        """The share that is done, from 0 to 1: of the steps, or of the minutes if these run out first."""
        settings = self.lesson.settings
        done = self.step / settings.steps
        if settings.max_minutes is None or done >= 1:
            return done
        # The mean of all processes' clocks: each must stop after the same step, or the others wait for it for ever.
        spent = self.lesson.processes.mean([self._spent()])[0]
        return max(done, spent / 60 / settings.max_minutes)

    def _spent(self) -> float:
        return self.elapsed + time.perf_counter() - self.clock

    def measure(self, progress: float) -> Measured:
        """Set the learning rate and the gradients of the next step."""
        settings, processes = self.lesson.settings, self.lesson.processes
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * _rate(progress, self.step, settings.steps)
        self.optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(2, dtype=torch.float64)
        for part in range(settings.accumulate):
            # Drawn by its number alone, not from a generator's state: a run that is resumed sees the same batches.
            number = self.step * settings.accumulate + part
            drawn = training_batch(
                self.lesson.data, number, settings.batch_size, settings.seed, processes.rank, processes.world
            )
            batch = move(drawn, processes.device)
            loss, same = _loss(self.lesson, batch)
            (loss / settings.accumulate).backward()
            figures += torch.tensor([loss.item(), same], dtype=torch.float64) / settings.accumulate
        # Averaged before it is clipped: processes that clip by norms of their own would drift apart.
        processes.average_gradients(self.lesson.parameters)
        size = float(nn.utils.clip_grad_norm_(self.lesson.parameters, CLIP))
        loss_now, same_now = processes.mean(figures.tolist())
        return Measured(loss_now, same_now, size, batch)

    def refuse_if_astray(self, measured: Measured) -> None:
        """Stop before a bad gradient reaches the weights, so that the norm to blame can still be found in them."""
        reason = self.guard.look(measured.loss, measured.agreement, measured.gradient)
        if not reason:
            return
        student = self.lesson.student
        with student.masked(measured.batch):
            culprit = worst_part(student, self.lesson.teacher, measured.batch)
        kept = (self.folder / checkpoints.STATE).is_file()
        where = f"the last good state is in {self.folder}" if kept else "it had not yet been saved"
        settings = self.lesson.settings
        # Maps in the place of all norms at once can be so far off that there is nothing to learn from (docs/swap.md).
        at_once = settings.schedule == "none" and settings.method in PROGRESSIVE
        hint = "; --schedule linear lets them go little by little" if at_once else ""
        raise Diverged(
            f"the training went astray at step {self.step + 1}: {reason}; {culprit} went first; {where}{hint}"
        )

    def take_step(self) -> None:
        """Update the student, which stays centred."""
        self.optimizer.step()
        self.lesson.student.project()
        self.step += 1


def _rate(progress: float, step: int, steps: int) -> float:
    """Warm-up, then a cosine from 1 to 0.05."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _loss(lesson: Lesson, batch: Batch) -> tuple[Tensor, float]:
    """The loss of one batch, and the agreement with the teacher."""
    student, teacher, settings = lesson.student, lesson.teacher, lesson.settings
    device = next(teacher.parameters()).device.type
    low = settings.mixed_precision == "bf16"
    mask = batch.get("attention_mask")
    with student.masked(batch), torch.autocast(device, dtype=torch.bfloat16, enabled=low):
        with torch.no_grad(), outputs_of(teacher, lesson.blocks) as wanted:
            name, expected = main_output(call(teacher, batch))
        with outputs_of(student.model, lesson.blocks) as features:
            _, found = main_output(call(student.model, batch))
    same = agreement(found.detach(), expected, mask)
    if settings.objective == "task":
        loss = label_loss(found, batch["labels"], shifted=lesson.data.shifted)
    else:
        loss = divergence(found, expected, mask) if ranks(name, found) else feature_error(found, expected, mask)
        parts = [feature_error(features[b], wanted[b], mask) for b in lesson.blocks if b in features and b in wanted]
        if parts:
            loss = loss + settings.feature_weight * torch.stack(parts).mean()
    errors = [error for one in student.attentions.values() if (error := one.take_error()) is not None]
    if errors and settings.matching:
        loss = loss + torch.stack(errors).mean()
    return _with_spread(loss, student, settings), same


def _with_spread(loss: Tensor, student: Student, settings: Settings) -> Tensor:
    """The loss and the auxiliary loss of norms that are to be frozen (arXiv 2507.02559, section 3.3)."""
    for norm in student.norms.values():
        if isinstance(norm, FrozenNorm) and norm.spread is not None:
            loss = loss if norm.frozen else loss + settings.spread_weight * norm.spread
            norm.spread = None  # or the graph of this batch would live on, and be gone through twice
    return loss
