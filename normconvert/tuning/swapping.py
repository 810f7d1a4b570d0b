"""``normconvert.swap``: open, analyse, calibrate, train, write, fuse, compare."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normconvert.errors import FidelityError, InputError, NormConvertError, NothingToConvert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import Source
from normconvert.tuning import checkpoints
from normconvert.tuning.data import Data, Wanted, all_batches, open_data, wanted_by
from normconvert.tuning.data.batches import Part
from normconvert.tuning.evaluation import Figures, evaluate
from normconvert.tuning.processes import Processes
from normconvert.tuning.result import SwapReport, in_words
from normconvert.tuning.seats import Seat, choose, find_seats
from normconvert.tuning.settings import Settings
from normconvert.tuning.student import Student, call, finish, make_student, make_teacher, measure, move
from normconvert.tuning.training import Trace, Watch, train
from normconvert.tuning.writing import LARGE_EPS, eps_key, plan_of, write_folder

HELD_BACK = 0.05
"""Share of the data that is measured on and not learnt from, where there is no other."""
FEW_PASSES = 100
"""More passes over the data than this are worth a word."""

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is to be swapped: the analysed source."""

    source: Source
    plan: Plan
    seats: tuple[Seat, ...]
    norms: int
    wanted: Wanted


def swap(
    src: str | Path,
    out: str | Path,
    method: str = "un",
    *,
    data: str = "demo:",
    fuse: bool = True,
    resume: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    arch: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    tensorboard: str | Path | None = None,
    watch: Watch | None = None,
    stage: Stage | None = None,
    warn: Stage | None = None,
    **settings: Any,
) -> SwapReport:
    """Swap LayerNorms for norms with fixed statistics, learn these from data, and fuse the norms away.

    Args:
        src: as of :func:`normconvert.convert`.
        out: the folder to make; the state of an unfinished run lies in ``OUT.training`` beside it.
        method: ``un``, ``repbn``, ``powernorm`` or ``ln-free``.
        data: what to learn from, ``KIND:WHERE``; see :data:`normconvert.tuning.data.KINDS`.
        fuse: move the swapped norms into the linear maps that read them.
        resume: go on with an unfinished run.
        device: where the networks run; several processes take a GPU each.
        revision: branch, tag or commit on the hub.
        arch: ``timm:NAME`` for bare weights.
        trust_remote_code: allow code that comes with the checkpoint to run.
        overwrite: replace an ``out`` that exists, once the new one is complete.
        tensorboard: a folder for TensorBoard's log; None: no log.
        watch: sees each step's figures.
        stage: called with each stage's name as it begins.
        warn: called, before anything is trained, with each sentence that the user may want to stop for.
        settings: further fields of :class:`normconvert.tuning.settings.Settings`.

    Raises:
        InputError: bad input or usage.
        TraceError: the model cannot be traced.
        NothingToConvert: there is no norm that can be swapped.
        Diverged: the training went astray; its last good state is kept.
        FidelityError: the fused model does not compute what the trained one computes.
    """
    from normconvert.apply.output_folder import check_output
    from normconvert.options import check_device

    try:
        chosen = Settings(method=method, data=data, **settings)
    except TypeError as error:
        raise InputError(f"unknown setting: {error}") from error
    chosen.check()
    out = Path(out).expanduser()
    folder = checkpoints.training_folder(out)
    check_device(device)
    processes = Processes(device)
    local = Path(src).expanduser()
    if processes.is_main:
        check_output(out, local if local.exists() else None, overwrite)
        checkpoints.check(folder, chosen, resume)
    processes.wait()
    clock = _Clock(stage)
    clock("open")
    from normconvert.sources import open_source

    source = open_source(str(src), revision=revision, arch=arch, trust_remote_code=trust_remote_code)
    subject = analyse(source, chosen, fuse, clock)
    clock("data")
    teacher = make_teacher(source.load(dtype=torch.float64), subject.plan, torch.float32).to(processes.device)
    learnt, measured, notes = _open_both(subject, teacher, chosen, processes)
    if warn is not None:
        for note in notes:
            warn(note)
    clock("calibrate")
    student = make_student(teacher, subject.plan, subject.seats, method, chosen.norm_options())
    size = chosen.batch_size
    parts = all_batches(learnt, size, chosen.calibration, processes.rank, processes.world)
    moments = measure(teacher, subject.seats, (move(b, processes.device) for b in parts))
    for path, found in moments.items():
        student.norms[path].calibrate(found)

    def figures_of(model: nn.Module) -> Figures:
        return evaluate(model, teacher, measured, processes, batch_size=size)

    figures = {"original": figures_of(teacher), "calibrated": figures_of(_finished(student).model)}
    trace = Trace(1)
    if chosen.steps:
        clock("train")
        with ExitStack() as stack:
            log = _tensorboard(tensorboard, stack) if processes.is_main else None
            trace = train(
                student, teacher, learnt, chosen, processes, folder, resume=resume, watch=_both(watch, log)
            )  # fmt: skip
    finish(student)
    figures["tuned"] = figures_of(student.model)
    report = SwapReport(
        source=str(src),
        library=source.library,
        architecture=source.architecture,
        out=None,
        settings=chosen,
        swapped=tuple(student.norms),
        left=(),
        plan=subject.plan,
        figures=figures,
        eval_data=measured.name,
        steps=int(trace.rows[-1]["step"]) if trace.rows else 0,
        trace=tuple(trace.rows),
        notes=tuple(notes),
    )
    if processes.is_main:
        report = write(report, subject, student, out, fuse=fuse, overwrite=overwrite, device=device, clock=clock)
        checkpoints.remove(folder)
    processes.wait()
    return replace(report, seconds=clock.seconds())


class _Clock:
    """Tells which stage begins, and how long each took."""

    def __init__(self, say: Stage | None) -> None:
        self.say, self.times = say, [("", time.perf_counter())]

    def __call__(self, name: str) -> None:
        self.times.append((name, time.perf_counter()))
        if self.say is not None:
            self.say(name)

    def seconds(self) -> dict[str, float]:
        ends = [at for _, at in self.times[1:]] + [time.perf_counter()]
        found: dict[str, float] = {}
        for (name, start), end in zip(self.times, ends, strict=True):
            if name:
                found[name] = found.get(name, 0.0) + end - start
        return found


def analyse(source: Source, settings: Settings, fuse: bool, clock: Callable[[str], None]) -> Subject:
    """What the norms of a source read and feed, and which are to be swapped.

    Raises:
        NothingToConvert: none can be.
    """
    clock("trace")
    from normconvert.rewrites.rmsnorm import plan_rmsnorm
    from normconvert.tracing.model_graph import trace_model

    if source.modules:
        raise InputError(f"{source.reference}: its norms have been changed already; swap those of the original")
    model = source.skeleton()
    graph = trace_model(model)
    # an embedding that is the head, too, cannot hold what the last norm leaves behind
    plan = plan_rmsnorm(graph, Options(tied="untie" if fuse else "center"))
    seats = find_seats(graph, plan)
    if not seats:
        reasons = "; ".join(dict.fromkeys(v.reason for v in plan.verdicts)) or "it has no LayerNorm"
        raise NothingToConvert(f"{source.reference}: no norm can be swapped: {reasons}")
    chosen = tuple(choose(seats, settings.norms))
    if fuse and not any(seat.role == "final" for seat in chosen):
        plan = plan_rmsnorm(graph, Options(tied="center"))
    return Subject(source, plan, chosen, len(plan.verdicts), wanted_by(source, source.skeleton()))


def _open_both(
    subject: Subject, teacher: nn.Module, settings: Settings, processes: Processes
) -> tuple[Data, Data, list[str]]:
    """What to learn from and what to measure on, checked against the model; sentences for the user."""
    learnt: Data = open_data(settings.data, subject.wanted, teacher, length=settings.length)
    own = settings.eval_data or (settings.data if settings.data.startswith("demo:") else None)
    if own is not None:
        measured = open_data(own, subject.wanted, teacher, length=settings.length, held_out=True)
    else:
        kept = max(1, round(len(learnt) * HELD_BACK))
        order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        measured = Part(learnt, tuple(sorted(order[:kept])))
        learnt = Part(learnt, tuple(sorted(order[kept:])))
    batch = settings.batch_size * processes.world
    if len(learnt) < batch:
        raise InputError(
            f"{settings.data}: {len(learnt)} examples to learn from are less than one batch of {batch}: "
            "give more data or a smaller --batch-size"
        )
    if settings.objective == "task" and not learnt.labelled:
        raise InputError(f"{settings.data}: --objective task needs labels, and there are none")
    notes = []
    passes = settings.steps * settings.accumulate * batch / len(learnt)
    if passes > FEW_PASSES:
        notes.append(f"little data: each of {len(learnt)} examples is seen {passes:.0f} times")
    for data in (learnt, measured):
        _try(data, teacher, processes)
    return learnt, measured, notes


def _try(data: Data, teacher: nn.Module, processes: Processes) -> None:
    """Refuse data that the original cannot take."""
    from normconvert.tuning.compare import main_output

    batch = move(data.batch([0]), processes.device)
    try:
        with torch.no_grad():
            found = main_output(call(teacher, batch))[1]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{data.name}: the model cannot take this data: {reason}") from error
    labels = batch.get("labels")
    if labels is not None and not data.shifted and (found.ndim != 2 or int(labels.max()) >= found.shape[-1]):
        raise InputError(f"{data.name}: label {int(labels.max())} for a model of {found.shape[-1]} classes")


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


def write(
    report: SwapReport,
    subject: Subject,
    student: Student,
    out: Path,
    *,
    fuse: bool,
    overwrite: bool,
    device: str,
    clock: Callable[[str], None],
) -> SwapReport:
    """Write the output, fused or not, complete or not at all."""
    from normconvert.apply.output_folder import staged_output

    source, method = subject.source, report.method
    key = None if fuse or source.dtype == torch.float16 else eps_key(source, subject.seats, subject.norms)
    plan = plan_of(
        student, subject.plan, method, eps=LARGE_EPS if key else 1.0, config_key=key, guarded=not fuse and key is None
    )
    with staged_output(out, source.folder or source.files[0], overwrite) as folder:
        clock("write")
        if not fuse:
            write_folder(source, student, plan, folder, source.dtype)
            report = replace(report, out=str(out), plan=plan, left=_left(plan, ()))
            _record(folder, source, report)
            return report
        with tempfile.TemporaryDirectory(prefix="normconvert-") as temporary:
            tuned = Path(temporary) / "tuned"
            tuned.mkdir()
            write_folder(source, student, plan, tuned, torch.float32)
            _record(tuned, source, replace(report, plan=plan))
            clock("fuse")
            from normconvert.tuning.fusing import fuse_folder

            fused = fuse_folder(
                tuned,
                folder,
                source,
                plan,
                device,
                lambda combined: _record(folder, source, replace(report, plan=combined)),
            )
        report = replace(
            report, out=str(out), plan=fused.plan, fused=fused.fidelity, left=_left(plan, fused.absorbed),
            notes=(*report.notes, *fused.notes),
        )  # fmt: skip
        if fused.fidelity is not None and not fused.fidelity.passed:
            raise FidelityError(
                f"{source.reference}: the fused model differs from the trained one: "
                f"{'; '.join(fused.fidelity.reasons)}; nothing was written"
            )
        _record(folder, source, report)
    return report


def _left(plan: Plan, absorbed: Iterable[str]) -> tuple[str, ...]:
    gone = set(absorbed)
    return tuple(v.path for v in plan.verdicts if v.path not in gone)


def _record(folder: Path, source: Source, report: SwapReport) -> None:
    """normconvert.json, which the loader reads, with what the training was and found; and the model card."""
    from normconvert.apply.record import RECORD_FORMAT

    data = report.to_json()
    record = {
        "format": RECORD_FORMAT,
        **data,
        "source": {"reference": Path(report.source).name, "revision": source.revision},
        "verification": data["fused"],
    }
    for key in ("out", "trace"):
        record.pop(key)
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n"
    (folder / "normconvert.json").write_text(text, encoding="utf-8")
    _card(folder, source, report)


def _card(folder: Path, source: Source, report: SwapReport) -> None:
    from normconvert.apply.model_card import auto_class, model_card

    existing = source.folder / "README.md" if source.folder else None
    text = model_card(
        report.source,
        report.plan,
        in_words(report),
        library=source.library,
        architecture=source.architecture,
        auto_class=auto_class(folder, source.architecture) or source.architecture,
        source_readme=existing.read_text(encoding="utf-8") if existing and existing.is_file() else None,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


__all__ = ["NormConvertError", "swap"]
