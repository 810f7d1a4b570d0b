"""``normconvert.swap``: open, analyse, calibrate, train, write, fuse, compare."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normconvert.errors import InputError, first_line
from normconvert.files.user_paths import user_path
from normconvert.option_fields import taking
from normconvert.options import check_device
from normconvert.result import Clock
from normconvert.tuning import checkpoints
from normconvert.tuning.attention import blend
from normconvert.tuning.data import all_batches
from normconvert.tuning.data.adversarial import adversarial
from normconvert.tuning.evaluation import Figures, evaluate
from normconvert.tuning.examples import Examples, open_examples
from normconvert.tuning.output import Target, write
from normconvert.tuning.processes import Processes
from normconvert.tuning.result import SwapReport
from normconvert.tuning.settings import Settings, Swapping
from normconvert.tuning.student import Student, call, finish, make_student, make_teacher, measure, move
from normconvert.tuning.subject import Subject, analyse
from normconvert.tuning.tails import check_tails, tails_of
from normconvert.tuning.training import Trace, Watch, train


@taking(Swapping)
def swap(request: Swapping) -> SwapReport:
    """Swap LayerNorms and RMSNorms for norms with fixed statistics, learn these from data, and fuse the norms away.

    Or swap softmax attention for a linear one (``sla``), or both (``slab``).

    The state of an unfinished run lies in ``OUT.training`` beside ``out``.

    Raises:
        InputError: bad input or usage.
        TraceError: the model cannot be traced.
        NothingToConvert: there is no norm, or no attention, that can be swapped.
        Diverged: the training went astray; its last good state is kept.
        HeavyTail: the worst losses are further from the original's than ``guard_tails`` allows; the trained state is
            kept.
        FidelityError: the fused model does not compute what the trained one computes.
    """
    run = Run.begin(request)
    target = Target(user_path(request.out), request.fuse, request.overwrite, request.device)
    course = _Course(checkpoints.training_folder(target.out), request.resume, request.tensorboard, request.watch)
    _check_folders(run, request.src, target, course)
    run.clock("open")
    from normconvert.sources import open_source

    source = open_source(str(request.src), **request.opening)
    subject = analyse(source, run.settings, request.fuse, run.clock)
    lesson = _prepare(subject, run)
    if request.warn is not None:
        for note in lesson.examples.notes:
            request.warn(note)
    student = _calibrated(lesson, run)
    figures = {"original": _figures(lesson.teacher, lesson, run)}
    figures["calibrated"] = _figures(_finished(student).model, lesson, run)
    trace = _trained(student, lesson, run, course)
    finish(student)
    figures["tuned"] = _figures(student.model, lesson, run)
    report = _report(str(request.src), student, lesson, run, figures, trace)
    report = _with_tails(report, student, lesson, run, course.folder)
    if run.processes.is_main:
        report = write(report, subject, student, target, run.clock)
        checkpoints.remove(course.folder)  # only now: while there is no output, it is all that is left of the training
    run.processes.wait()
    return replace(report, seconds=run.clock.seconds())


@dataclass(frozen=True)
class Run:
    """What all stages read: what the user chose, the processes, and the clock that is told each stage."""

    settings: Settings
    processes: Processes
    clock: Clock

    @classmethod
    def begin(cls, request: Swapping) -> Run:
        """Check the settings and the device, and find the other processes."""
        settings = request.settings
        settings.check()
        check_device(request.device)
        return cls(settings, Processes(request.device), Clock(request.stage))


@dataclass(frozen=True)
class _Course:
    """How the training goes on and who sees it: see :func:`swap`."""

    folder: Path
    resume: bool
    tensorboard: str | Path | None
    watch: Watch | None


@dataclass(frozen=True)
class _Lesson:
    """A subject, its original as the teacher, and the data."""

    subject: Subject
    teacher: nn.Module
    examples: Examples


def _check_folders(run: Run, src: str | Path, target: Target, course: _Course) -> None:
    """Refuse what would fail after hours of training: an output that may not be written, a state of another run."""
    from normconvert.apply.output_folder import check_output

    local = user_path(src)
    if run.processes.is_main:
        check_output(target.out, local if local.exists() else None, target.overwrite)
        checkpoints.check(course.folder, run.settings, course.resume)
    run.processes.wait()


def _prepare(subject: Subject, run: Run) -> _Lesson:
    """Make the teacher, and open the data."""
    run.clock("data")
    # Centred in float64, so that the teacher is the original but for one rounding to float32.
    teacher = make_teacher(subject.source.load(dtype=torch.float64), subject.plan, torch.float32)
    teacher = teacher.to(run.processes.device)
    return _Lesson(subject, teacher, open_examples(subject.wanted, teacher, run.settings, run.processes))


def _calibrated(lesson: _Lesson, run: Run) -> Student:
    """The student, whose norms start from the statistics of one pass through the teacher."""
    run.clock("calibrate")
    settings, processes, subject = run.settings, run.processes, lesson.subject
    student = make_student(lesson.teacher, subject.plan, subject.sites, settings.norm_method, settings.norm_options())
    student = replace(student, attentions=blend(student.model, subject.attentions, convolution=settings.convolution))
    _try_attention(student, lesson, run)
    if not subject.sites:
        return student
    batches = all_batches(
        lesson.examples.learnt, settings.batch_size, settings.calibration, processes.rank, processes.world
    )
    moments = measure(lesson.teacher, subject.sites, (move(batch, processes.device) for batch in batches))
    for path, found in moments.items():
        student.norms[path].calibrate(found)
    return student


def _try_attention(student: Student, lesson: _Lesson, run: Run) -> None:
    """Refuse what linear attention cannot take: images of another size, a forward that calls attention twice."""
    if not student.attentions:
        return
    batch = move(lesson.examples.learnt.batch([0]), run.processes.device)
    try:
        with torch.no_grad():
            call(student.model, batch)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{lesson.subject.source.reference}: {first_line(error)}") from error


def _figures(model: nn.Module, lesson: _Lesson, run: Run) -> Figures:
    size = run.settings.batch_size
    return evaluate(model, lesson.teacher, lesson.examples.measured, run.processes, batch_size=size)


def _trained(student: Student, lesson: _Lesson, run: Run, course: _Course) -> Trace:
    """Train the student in place, if there are steps to take."""
    if not run.settings.steps:
        return Trace(1)
    run.clock("train")
    with ExitStack() as stack:
        log = _tensorboard(course.tensorboard, stack) if run.processes.is_main else None
        return train(
            student, lesson.teacher, lesson.examples.learnt, run.settings, run.processes, course.folder,
            resume=course.resume, watch=_both(course.watch, log),
        )  # fmt: skip


def _report(
    src: str, student: Student, lesson: _Lesson, run: Run, figures: dict[str, Figures], trace: Trace
) -> SwapReport:
    """The report as it is before anything is written."""
    source = lesson.subject.source
    return SwapReport(
        source=src,
        library=source.library,
        architecture=source.architecture,
        out=None,
        settings=run.settings,
        swapped=tuple(student.norms),
        attention=tuple(student.attentions),
        attention_left=dict(lesson.subject.left),
        left=(),
        plan=lesson.subject.plan,
        figures=figures,
        eval_data=lesson.examples.measured.name,
        steps=trace.steps,
        trace=tuple(trace.rows),
        notes=lesson.examples.notes,
    )


def _with_tails(report: SwapReport, student: Student, lesson: _Lesson, run: Run, folder: Path) -> SwapReport:
    """The report with the worst losses, on what is held back and on what the model rarely meets; refused if too bad."""
    examples, settings = lesson.examples, run.settings
    odd = adversarial(lesson.subject.wanted, examples.learnt, examples.measured)
    sets = {"held-out data": examples.measured, **{data.name: data for data in odd}}
    tails, notes = tails_of(student.model, lesson.teacher, sets, run.processes, batch_size=settings.batch_size)
    if not odd:
        notes = (*notes, "tails on held-out data only: no odd data can be made up for what this model takes")
    if settings.guard_tails is not None:
        kept = f"; the trained state is in {folder}: --resume goes on from it with another --guard-tails"
        check_tails(tails, settings.guard_tails, kept if settings.steps else "")
    return replace(report, tails=tails, notes=(*report.notes, *notes))


def _finished(student: Student) -> Student:
    """A copy as it would be if the training ended now."""
    other = copy.deepcopy(student)
    finish(other)
    return other


def _tensorboard(folder: str | Path | None, stack: ExitStack) -> Watch | None:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs tensorboard: pip install 'normconvert[swap]'") from error
    writer = SummaryWriter(str(folder))
    stack.callback(writer.close)

    def write(step: int, steps: int, shown: Any) -> None:
        for name, value in shown.items():
            writer.add_scalar(f"train/{name}", value, step)

    return write


def _both(*watches: Watch | None) -> Watch:
    def watch(step: int, steps: int, shown: Any) -> None:
        for one in watches:
            if one is not None:
                one(step, steps, shown)

    return watch
