"""The output folder of a swap, fused or not: complete or not there at all, with its record and its model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from normconvert.errors import FidelityError
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import Source
from normconvert.tuning.result import SwapReport, in_words
from normconvert.tuning.student import Student
from normconvert.tuning.subject import Subject
from normconvert.tuning.writing import LARGE_EPS, eps_key, plan_of, write_folder


@dataclass(frozen=True)
class Target:
    """Where the result goes, and what is made of it.

    Attributes:
        out: the folder to make.
        fuse: move the swapped norms into the linear maps beside them.
        overwrite: replace an ``out`` that exists, once the new one is complete.
        device: where the fused model is compared with the trained one.
    """

    out: Path
    fuse: bool
    overwrite: bool
    device: str


def write(
    report: SwapReport, subject: Subject, student: Student, target: Target, clock: Callable[[str], None]
) -> SwapReport:
    """Write the output, fused or not, complete or not at all.

    Args:
        report: what the training was and found.
        subject: what was swapped.
        student: finished.
        target: where to.
        clock: told when a stage begins.

    Returns:
        The report of what was written.

    Raises:
        FidelityError: the fused model does not compute what the trained one computes.
        NothingToConvert: none of the swapped norms can be fused.
        InputError: it cannot be written.
    """
    from normconvert.apply.output_folder import staged_output

    source = subject.source
    plan = _plan(report.method, subject, student, target)
    with staged_output(target.out, source.folder or source.files[0], target.overwrite) as folder:
        clock("write")
        if target.fuse and subject.sites:
            report = _write_fused(report, source, student, plan, _Staged(folder, target, clock))
        else:
            write_folder(source, student, plan, folder, source.dtype)
            report = replace(report, out=str(target.out), plan=plan, left=_left(plan, ()))
        _record(folder, source, report)
    return report


def _plan(method: str, subject: Subject, student: Student, target: Target) -> Plan:
    """What the record of the unfused folder says."""
    # float16 cannot hold weights that are 10⁶ times as large, so there is no such ε; fusing takes the norms away.
    plain = target.fuse or subject.source.dtype == torch.float16
    # Unmodified library code would compute softmax attention with weights that were trained for another.
    key = None if plain or subject.attentions else eps_key(subject.source, subject.sites, subject.norms)
    eps = LARGE_EPS if key else 1.0
    return plan_of(
        student,
        subject.plan,
        method,
        eps=eps,
        config_key=key,
        guarded=not target.fuse and key is None,
        renamed=subject.source.library == "transformers",
    )


@dataclass(frozen=True)
class _Staged:
    """A folder that becomes the output once it is complete."""

    folder: Path
    target: Target
    clock: Callable[[str], None]


def _write_fused(report: SwapReport, source: Source, student: Student, plan: Plan, staged: _Staged) -> SwapReport:
    """Write the trained model for a while, and the fused one, which has been compared with it, to stay."""
    with tempfile.TemporaryDirectory(prefix="normconvert-") as temporary:
        tuned = Path(temporary) / "tuned"
        tuned.mkdir()
        # In float32, whatever the source's dtype: what is fused is rounded once, at the end.
        write_folder(source, student, plan, tuned, torch.float32)
        _record(tuned, source, replace(report, plan=plan))
        staged.clock("fuse")
        from normconvert.tuning.fusing import fuse_folder

        fused = fuse_folder(
            tuned,
            staged.folder,
            source,
            plan,
            staged.target.device,
            # The comparison loads the folder as users do, by its record; it is written again with what was found.
            lambda combined: _record(staged.folder, source, replace(report, plan=combined)),
        )
    if fused.fidelity is not None and not fused.fidelity.passed:
        raise FidelityError(
            f"{source.reference}: the fused model differs from the trained one: "
            f"{'; '.join(fused.fidelity.reasons)}; nothing was written"
        )
    return replace(
        report, out=str(staged.target.out), plan=fused.plan, fused=fused.fidelity, left=_left(plan, fused.absorbed),
        notes=(*report.notes, *fused.notes),
    )  # fmt: skip


def _left(plan: Plan, absorbed: Iterable[str]) -> tuple[str, ...]:
    gone = set(absorbed)
    return tuple(v.path for v in plan.verdicts if v.path not in gone)


def _record(folder: Path, source: Source, report: SwapReport) -> None:
    """normconvert.json, which the loader reads, with what the training was and found; and the model card."""
    from normconvert.apply.record import RECORD_FORMAT, put_card, put_record

    data = report.to_json()
    record = {
        "format": RECORD_FORMAT,
        **data,
        "source": {"reference": Path(report.source).name, "revision": source.revision},
        "verification": data["fused"],
    }
    for key in ("out", "trace"):
        record.pop(key)
    put_record(folder, record)
    put_card(folder, source, report.source, report.plan, in_words(report), Path(report.out or folder).absolute().name)
