"""The Python API: `convert`, `inspect`, `verify`, `identify`. The lines of `convert` are the stages of the pipeline.

The other public functions stand in the rooms of their stages; :mod:`normconvert` names them all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from normconvert.apply.record import loading_files, write_card, write_record
from normconvert.apply.workplace import Workplace, workplace
from normconvert.errors import InputError
from normconvert.files.user_paths import user_path
from normconvert.option_fields import check_options, is_model, recorded, taking
from normconvert.options import FORMS, ROTATIONS, Conversion, Identifying, Inspection, Stage, check_device
from normconvert.result import Report
from normconvert.tracing.garbage import collecting
from normconvert.verification.requests import Verification
from normconvert.wording.steps import Fact, Step

if TYPE_CHECKING:
    import torch

    from normconvert.apply.shard_stream import Stream
    from normconvert.files.tensor_info import TensorInfo
    from normconvert.identification import Identification
    from normconvert.plan.conversion_plan import Plan
    from normconvert.sources import Source
    from normconvert.sources.opening import Found
    from normconvert.tracing.graph import Graph
    from normconvert.verification.fidelity import Fidelity

Asked = TypeVar("Asked", Inspection, Conversion)
NO_ROOM = "not verified: the disk has no room for the source beside the output (--stream)"


@taking(Inspection)
def inspect(request: Inspection) -> Report:
    """What :func:`convert` would do with ``src``, or :func:`convert_model` with a model in memory, norm by norm.

    Writes nothing but an anatomy, if asked for.

    Raises:
        InputError: the source is not a usable checkpoint.
        TraceError: the model cannot be traced.
    """
    check_options(request)
    request.check_measuring()
    request = _with_rotation(request)
    if request.anatomy is None and request.form != FORMS[0]:
        raise InputError(f"--format {request.form} is a form of an anatomy: say where to write it, --anatomy FILE")
    if is_model(request.src):
        from normconvert.in_memory.conversion import inspect_model

        return inspect_model(request)
    if request.example_inputs is not None:
        raise InputError("example_inputs are for models in memory, and src is a checkpoint")
    with collecting(False):
        _, report, graph = _plan(request, _told(request.stage or _silent))
    if request.anatomy is not None:
        from normconvert.rewrites.anatomy import write_anatomy

        write_anatomy(graph, request.anatomy, request.form)
    return report


@taking(Identifying)
def identify(request: Identifying) -> Identification:
    """Find the architectures whose tensors have the names and shapes of a checkpoint.

    Names and shapes alone are read, no values, and a config.json is not believed but only quoted. What fits exactly is
    told from an index, without torch. If nothing does, models may be built on the meta device to see whether another
    image size or number of input channels explains the difference.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read.
    """
    from normconvert.identification import identify_names, read_names
    from normconvert.sources.opening import locate

    located, _ = locate(str(request.path), request.revision)
    return identify_names(str(request.path), read_names(located))


@taking(Verification)
def verify(request: Verification) -> Fidelity:
    """Fidelity of `b` to `a`, two checkpoints of the same model, or two models in memory.

    If `b` was written by normconvert, its plan is replayed on `a`'s weights in float64: that is held to 1e-10. For
    any other pair the algebra compares `b` with `a` in float64 as they are stored; since storing alone rounds, the
    tolerance there is 32 units (eps) of the coarser storage dtype. With ``max_memory``, in bytes, each weight is read
    when its turn comes, for all probes at once, and freed; otherwise whole models are loaded, two at a time.

    Raises:
        InputError: a checkpoint cannot be read, the two are of different architectures or shapes, or a limit is none.
    """
    if is_model(request.a) or is_model(request.b):
        from normconvert.in_memory.comparison import verify_pair

        return verify_pair(request)
    if request.example_inputs is not None:
        raise InputError("example_inputs are for models in memory, and a and b are checkpoints")
    from normconvert.verification.equivalence import verify_checkpoints

    return verify_checkpoints(request)


@taking(Conversion)
def convert(request: Conversion) -> Report:
    """Convert the norms of a checkpoint and write the result to ``out``, complete or not at all.

    Returns:
        A report with the plan, the verdicts and the fidelity figures.

    Raises:
        InputError: bad input or usage.
        TraceError: the model cannot be traced.
        NothingToConvert: no norm, or with ``require_all`` not every norm, can be converted; its ``report`` has the
            verdicts.
        FidelityError: the result differs from the original; ``out`` was not made. Its ``report`` has the figures.
    """
    limits = _check(request)
    request = _with_rotation(request)
    request = replace(request, name=request.name or request.push_to_hub)
    with workplace(request) as place:
        source, report, graph = _plan(request, place.found, place.stream)
        from normconvert.verification.outcome import refuse_if_pointless

        refuse_if_pointless(report, request.require_all)
        if request.dry_run:
            return report
        request, report = _with_powers(request, source, report, graph)
        report = _with_family(source, _with_statistics(source, report), request, graph)
        with place.folder(source, report) as folder:
            report, hashes = _write(request, source, report, folder, place)
            if place.can_verify(request):
                report = _verify(request, source, graph, report, folder, limits)
            elif request.verify:
                report = replace(report, notes=(*report.notes, NO_ROOM))
            write_record(folder, source, report, hashes)
            write_card(folder, source, report)
            # Again: the verification has read the source once more.
            place.reader.check_unchanged()
    if request.push_to_hub is not None:
        from normconvert.apply.upload import upload

        (request.stage or _silent)(f"uploading to {request.push_to_hub}")
        upload(user_path(request.out), request.push_to_hub, request.method, private=not request.public)
        report = replace(report, uploaded=request.push_to_hub)
    return report


def _check(request: Conversion) -> dict[str, float]:
    """Refuse what cannot be done before any of it is; the limits as numbers.

    Raises:
        InputError: an option has no such value, or ``out`` is not to be had.
    """
    from normconvert.apply.output_folder import check_output
    from normconvert.verification.limits import check_limits

    check_options(request)
    request.check_measuring()
    if request.push_to_hub is not None:
        from normconvert.apply.upload import check_repository

        check_repository(request.push_to_hub, str(request.src))
    elif request.public:
        raise InputError("--public says how --push-to-hub REPO uploads: name the repository")
    limits = check_limits(request.limits or {})
    if limits and not request.verify:
        raise InputError(f"limits ({', '.join(limits)}) are held against the verification, which is switched off")
    if request.method == "scale" and request.stream and request.power is None:
        raise InputError("--stream reads the weights once, as they are written: say --power")
    if not request.dry_run:
        local = user_path(request.src)
        check_output(user_path(request.out), local if local.exists() else None, request.overwrite)
        if request.verify:
            check_device(request.device)
    return limits


def _with_rotation(request: Asked) -> Asked:
    """The request with the content of the rotation's file in place of its path.

    Raises:
        InputError: it is no file of an orthogonal matrix.
    """
    if request.rotation in ROTATIONS:
        return request
    from normconvert.plan.given_rotations import with_rotation_read

    return with_rotation_read(request)


def _plan(
    request: Inspection | Conversion, found: Found | None = None, stream: Stream | None = None
) -> tuple[Source, Report, Graph]:
    """Open the source, trace its model, and say what becomes of every norm."""
    say = request.stage or _silent
    say("open")
    start = time.perf_counter()
    if stream is not None:
        source = stream.open(str(request.src), request.how)
    else:
        from normconvert.sources import open_source

        source = open_source(str(request.src), found=found, **request.opening)
    say(Step("building the model", 1, 2))
    model = source.skeleton()
    opened = time.perf_counter()
    say("trace")
    from normconvert.rewrites.other_norms import other_norms
    from normconvert.rewrites.planning import planned
    from normconvert.tracing.model_graph import tracing_told

    plan, graph = planned(model, request.allowed, request.method, tracing_told(say))
    if request.native and request.method == "rmsnorm":
        from normconvert.rewrites.native import native_plan

        plan = native_plan(source, plan, graph)
    traced = time.perf_counter()
    lists = isinstance(request, Inspection) or not plan.verdicts
    dtype = str(source.dtype).removeprefix("torch.")
    wanted = request.dtype if isinstance(request, Conversion) else "auto"
    report = Report(
        source=str(request.src),
        library=source.library,
        architecture=source.architecture,
        method=request.method,
        out=None,
        plan=plan,
        dtype=dtype,
        stored=dtype if wanted == "auto" else wanted,
        seconds={"open": opened - start, "trace": traced - opened},
        notes=(*source.notes, *plan.notes),
        others=tuple(other_norms(graph, request.method)) if lists else (),
        factory=source.factory,
        options={**recorded(request), **({"arch": source.architecture} if source.factory else {})},
    )
    return source, report, graph


def _told(say: Stage) -> Found:
    """Tells what is known of a source by its headers, which is long before it is traced."""

    def found(tensors: Iterable[TensorInfo], folder: Path | None, facts: Sequence[str]) -> None:
        for fact in facts:
            say(Fact(fact))

    return found


def _silent(stage: str) -> None:
    """Told of a stage when nobody listens."""


def _after(stage: str, start: float, report: Report) -> Report:
    """The report with the seconds that a stage took which began at ``start``."""
    spent = report.seconds.get(stage, 0.0) + time.perf_counter() - start
    return replace(report, seconds={**report.seconds, stage: spent})


def _with_powers(request: Conversion, source: Source, report: Report, graph: Graph) -> tuple[Conversion, Report]:
    """The request with the powers of two that were measured, where it leaves them open, and the report of that plan.

    Raises:
        NothingToConvert: all streams fit as they are.
    """
    if request.method != "scale" or request.power is not None:
        return request, report
    import torch

    from normconvert.tracing.probes import verification_inputs
    from normconvert.tuning.data.probes import data_probes
    from normconvert.verification.stream_powers import measured_powers, with_powers

    (request.stage or _silent)("measure")
    start = time.perf_counter()
    allowed = request.allowed
    probes = [p for p in verification_inputs(source.skeleton(), tokenizer=source.tokenizer()) if p.realistic]
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    model = source.load(dtype=wide, device=request.device)
    probes += data_probes(source, request.data, model) if request.data is not None else []
    found = measured_powers(model, graph, allowed, probes)
    return replace(request, power=found.power), _after("measure", start, with_powers(report, graph, allowed, found))


def _with_statistics(source: Source, report: Report) -> Report:
    """The report with what there is to say of the running statistics that would be folded into weights."""
    from normconvert.apply.layout import origins_of
    from normconvert.verification.running_statistics import check_statistics

    origins = origins_of(source, report.plan)
    notes = check_statistics(report.plan, source.reference, lambda name: source.read(origins[name]), origins)
    return replace(report, notes=(*report.notes, *notes))


def _with_family(source: Source, report: Report, request: Conversion, graph: Graph) -> Report:
    """The report with the classes of the model's family for which the plan is proved too, and those where it is not."""
    from normconvert.rewrites.family_plan import with_family

    start = time.perf_counter()
    plan = with_family(source, report.plan, request.allowed, compare=request.verify, whole=graph)
    notes = plan.notes[len(report.plan.notes) :]
    return _after("trace", start, replace(report, plan=plan, notes=(*report.notes, *notes)))


def _write(
    request: Conversion, source: Source, report: Report, folder: Path, place: Workplace
) -> tuple[Report, dict[str, str]]:
    """Apply the plan to the source's files; the report of it, and file name -> sha256 of the source's."""
    from normconvert.apply.checkpoint import write_checkpoint

    (request.stage or _silent)("write")
    start = time.perf_counter()
    written = write_checkpoint(
        source, report.plan, folder, dtype=_torch_dtype(request.dtype), max_shard_size=request.max_shard_size,
        progress=request.progress, extra_files=loading_files(source, report.plan, request.dtype), reader=place.reader,
        stream=place.stream,
    )  # fmt: skip
    report = replace(
        report,
        out=str(user_path(request.out)),
        bytes_written=written.bytes_written,
        tensors_edited=len(written.edited),
        tensors_copied=written.copied,
        notes=tuple(dict.fromkeys((*report.notes, *written.notes))),
    )
    report = _after("write", start, report)
    # The verification loads the folder, and the loader reads the record.
    write_record(folder, source, report, written.hashes)
    return report, written.hashes


def _verify(
    request: Conversion, source: Source, graph: Graph, report: Report, folder: Path, limits: Mapping[str, float]
) -> Report:
    """Hold what was written against the original, and the graph of the edited model against the original's, ``graph``.

    Raises:
        FidelityError: it differs.
    """
    from normconvert.verification.outcome import with_difference, with_fidelity

    (request.stage or _silent)("verify")
    start = time.perf_counter()
    with collecting(True):
        fidelity = _fidelity(request, source, report.plan, folder, limits)
        fidelity = with_difference(fidelity, graph, report.plan, request.allowed)
    return with_fidelity(_after("verify", start, report), fidelity, "nothing was written")


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _fidelity(request: Conversion, source: Source, plan: Plan, folder: Path, limits: Mapping[str, float]) -> Fidelity:
    import torch

    from normconvert.sources.converted import load
    from normconvert.tracing.probes import verification_inputs
    from normconvert.verification.equivalence import overflow_mended, tolerance_for, verify_models, watched_norms
    from normconvert.verification.limits import judge_limits
    from normconvert.verification.rounding import ROUNDING_TOLERANCE

    dtype, device, level = _torch_dtype(request.dtype) or source.dtype, request.device, request.verify_level
    reopened = partial(load, folder, device=device, trust_remote_code=source.trust_remote_code, arch=source.factory)
    say = request.stage or _silent
    probes = verification_inputs(source.skeleton(), seed=0, tokenizer=source.tokenizer(), level=level)
    fidelity = verify_models(
        truth=lambda: source.load(dtype=torch.float64, device=device),
        algebra=None,
        plan=plan,
        wider=(lambda: source.load(dtype=torch.bfloat16, device=device)) if overflow_mended(plan, dtype) else None,
        original=lambda: source.load(dtype=dtype, device=device),
        converted=partial(reopened, dtype=dtype),
        exact=partial(reopened, dtype=torch.float64),
        from_files=not source.is_pickle,  # whose tensors are read once, for all models
        level=level,
        told=say,
        probes=probes,
        tolerance=min(tolerance_for(plan), limits.get("algebra", math.inf)),
        conditioned="algebra" not in limits,
        rounding_tolerance=min(ROUNDING_TOLERANCE, limits.get("rounding", math.inf)),
        converted_norms=watched_norms(plan),
    )
    return judge_limits(fidelity, limits)
