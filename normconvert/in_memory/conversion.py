"""`convert_model`: the stages of the pipeline, for a model in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from normconvert.apply.source_reader import check_finite
from normconvert.apply.state import edited_tensors
from normconvert.errors import InputError
from normconvert.in_memory.editing import put_in
from normconvert.in_memory.request import ModelConversion
from normconvert.in_memory.subject import Subject, subject_of
from normconvert.option_fields import check_options, recorded, taking
from normconvert.options import LEVELS, Inspection, Options
from normconvert.plan.given_rotations import with_rotation_read
from normconvert.result import Clock, Report
from normconvert.rewrites.anatomy import write_anatomy
from normconvert.rewrites.other_norms import other_norms
from normconvert.rewrites.planning import planned
from normconvert.tracing.garbage import collecting
from normconvert.tracing.graph import Graph
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.probes.choose import floating_dtype
from normconvert.verification.algebra import named_tensors
from normconvert.verification.equivalence import tolerance_for, verify_models, watched_norms
from normconvert.verification.limits import check_limits, judge_limits
from normconvert.verification.outcome import refuse_if_pointless, with_difference, with_fidelity
from normconvert.verification.rounding import ROUNDING_TOLERANCE
from normconvert.verification.running_statistics import check_statistics
from normconvert.verification.stream_powers import measured_powers, with_powers

if TYPE_CHECKING:
    from normconvert.verification.fidelity import Fidelity


@taking(ModelConversion)
def convert_model(request: ModelConversion) -> tuple[Any, Report]:
    """Convert the norms of a model in memory: the same plan, proof and verification as for files.

    What is proved is the traced calls, in eval mode: those that the library's models take, every door in and out of
    them, or those of ``example_inputs`` and no others. A branch of ``forward`` that they do not take, on another shape,
    argument or flag, is not proved: list a call for it. The verification also runs other values and sizes. Whatever a
    forward hook of the model's owner is given counts as returned, so that it stays as it is; hooks run on the probes.
    What a call leaves in the modules (``self.h = x``) is named as not proved; what it puts elsewhere, into a list that
    it is given, a global or an attribute of a tensor, is seen by no trace and may change.

    Weights are edited in float64 and stored in their dtype. Modes, device and ``requires_grad`` stay, and ties do, but
    for what the plan unties. Parameters stay the objects that they are; those of fused norms are gone from the model.

    Returns:
        The converted model, ``model`` itself if ``inplace``, and the report.

    Raises:
        InputError: the model or how it is called cannot be used.
        TraceError: the model cannot be traced.
        NothingToConvert: no norm, or with ``require_all`` not every norm, can be converted; its ``report`` has the
            verdicts.
        FidelityError: the converted model differs; ``model`` is as it was. Its ``report`` has the figures.
    """
    check_options(request)
    request.allowed.check_measuring()
    request = with_rotation_read(request)
    limits = _checked_limits(request)
    subject = subject_of(request.model, request.example_inputs)
    clock = Clock(request.stage)
    with collecting(False):
        report, graph = _planned(subject, request.method, request.allowed, recorded(request), clock)
    refuse_if_pointless(report, request.require_all)
    if request.method == "scale" and request.power is None:
        clock("measure")
        request, report = _with_powers(subject, report, graph, request)
    report = _with_statistics(subject, report)
    clock("write")
    values = edited_tensors(report.plan, named_tensors(subject.model))
    put_in(edited := subject.copy(), report.plan, values)
    report = replace(report, tensors_edited=len(values))
    if request.verify:
        clock("verify")
        fidelity = judge_limits(_fidelity(request, subject, edited, report, limits), limits)
        fidelity = with_difference(fidelity, graph, report.plan, request.allowed)
        report = with_fidelity(report, fidelity, "the model is as it was")
    if request.inplace:
        del edited  # its tensors are those of the model now
        put_in(edited := subject.model, report.plan, values)
        subject.forgetful(edited)
    return edited, replace(report, seconds=clock.seconds())


def inspect_model(request: Inspection) -> Report:
    """:func:`normconvert.inspect` of a model in memory."""
    subject = subject_of(request.src, request.example_inputs, "src")
    clock = Clock(request.stage)
    with collecting(False):
        report, graph = _planned(subject, request.method, request.allowed, recorded(request), clock)
    if request.anatomy is not None:
        write_anatomy(graph, request.anatomy, request.form)
    return replace(report, seconds=clock.seconds())


def _checked_limits(request: ModelConversion) -> dict[str, float]:
    if request.verify and request.verify not in LEVELS:
        raise InputError(f"unknown verify {request.verify!r}; expected one of {', '.join(LEVELS)}, or None")
    limits = check_limits(request.limits or {})
    if limits and not request.verify:
        raise InputError(f"limits ({', '.join(limits)}) are held against the verification, which is switched off")
    return limits


def _planned(
    subject: Subject, method: str, allowed: Options, options: dict[str, Any], clock: Clock
) -> tuple[Report, Graph]:
    """What becomes of every norm; no weight is read."""
    if allowed.native:
        raise InputError("native is for checkpoints: a model in memory keeps its class")
    clock("trace")
    plan, graph = planned(subject.skeleton, allowed, method, subject.tracer)
    shapes = {name: list(tensor.shape) for name, tensor in subject.skeleton.state_dict().items()}
    dtype = str(floating_dtype(subject.model)).removeprefix("torch.")
    report = Report(
        source=subject.name, library=subject.library, architecture=subject.name, method=method, out=None,
        plan=replace(plan, shapes=shapes), dtype=dtype, stored=dtype, notes=tuple(plan.notes), options=options,
        others=tuple(other_norms(graph, method)),
    )  # fmt: skip
    return report, graph


def _with_powers(
    subject: Subject, report: Report, graph: Graph, request: ModelConversion
) -> tuple[ModelConversion, Report]:
    """The request with the powers of two that the streams need, and the report with the plan for them."""
    if request.data is not None:
        raise InputError("data is for files; a model in memory is measured on example_inputs: give more of them")
    probes = [probe for probe in subject.probes("standard") if probe.realistic]
    found = measured_powers(subject.in_float64(), graph, request.allowed, probes)
    return replace(request, power=found.power), with_powers(report, graph, request.allowed, found)


def _with_statistics(subject: Subject, report: Report) -> Report:
    """The report with what there is to say of the weights that are about to be edited; some are refused."""
    tensors = named_tensors(subject.model)
    for name, parameter in subject.model.named_parameters():
        check_finite(name, parameter.detach())
    notes = check_statistics(report.plan, subject.name, tensors.__getitem__, {name: name for name in tensors})
    return replace(report, notes=(*report.notes, *notes))


def _fidelity(
    request: ModelConversion, subject: Subject, edited: nn.Module, report: Report, limits: dict[str, float]
) -> Fidelity:
    plan, level, say = report.plan, str(request.verify), request.stage
    return verify_models(
        truth=subject.in_float64,
        algebra=None,
        plan=plan,
        # Copies, since what runs is changed: its mode, its caches, its weights.
        original=subject.copy,
        converted=lambda: copy_model(edited),
        exact=lambda: subject.in_float64(edited),
        level=level,
        told=say,
        probes=subject.probes(level),
        tolerance=min(tolerance_for(plan), limits.get("algebra", tolerance_for(plan))),
        conditioned="algebra" not in limits,
        rounding_tolerance=min(ROUNDING_TOLERANCE, limits.get("rounding", ROUNDING_TOLERANCE)),
        converted_norms=watched_norms(plan),
    )
