"""The Python API: `convert`, `inspect`. The command line calls these, `verify` and `load`, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from normconvert.apply.record import loading_files, write_card, write_record
from normconvert.errors import FidelityError, InputError, NormConvertError, NothingToConvert
from normconvert.options import DTYPES, METHODS, Options, check_device, check_method
from normconvert.result import Report
from normconvert.tracing.garbage import collecting

if TYPE_CHECKING:
    import torch

    from normconvert.apply.shard_stream import Stream
    from normconvert.files.tensor_info import TensorInfo
    from normconvert.identification import Identification
    from normconvert.plan.conversion_plan import Plan
    from normconvert.sources import Source
    from normconvert.sources.opening import Found
    from normconvert.verification.fidelity import Fidelity

SHIFTED = "shifted outputs: "
NO_ROOM = "not verified: the disk has no room for the source beside the output (--stream)"

Failure = TypeVar("Failure", bound=NormConvertError)
Stage = Callable[[str], None]
"""Called with the name of each stage as it begins: ``open``, ``trace``, ``write``, ``verify``."""


def inspect(
    src: str | Path,
    method: str = "rmsnorm",
    *,
    revision: str | None = None,
    arch: str | None = None,
    fold: bool = False,
    tied: str | None = None,
    min_gain: int | None = None,
    allow_shifted_outputs: bool = False,
    merge_branches: bool = False,
    basis: str = "isometric",
    trust_remote_code: bool = False,
    stage: Stage | None = None,
) -> Report:
    """What :func:`convert` would do with ``src``, norm by norm; writes nothing.

    Raises:
        InputError: the source is not a usable checkpoint.
        TraceError: the model cannot be traced.
    """
    options = Options(tied, min_gain, allow_shifted_outputs, fold, merge_branches=merge_branches, basis=basis)
    with collecting(False):
        return _plan(src, method, revision, arch, options, trust_remote_code, stage)[1]


def identify(path: str | Path, *, revision: str | None = None) -> Identification:
    """Find the architectures whose tensors have the names and shapes of a checkpoint.

    Names and shapes alone are read, no values, and a config.json is not believed but only quoted. What fits exactly is
    told from an index, without torch. If nothing does, models may be built on the meta device to see whether another
    image size or number of input channels explains the difference.

    Args:
        path: a weight file (safetensors or a pickle), a folder, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read.
    """
    from normconvert.identification import identify_names, read_names
    from normconvert.sources.opening import locate

    located, _ = locate(str(path), revision)
    return identify_names(str(path), read_names(located))


def convert(
    src: str | Path,
    out: str | Path,
    method: str = "rmsnorm",
    *,
    revision: str | None = None,
    arch: str | None = None,
    dtype: str = "auto",
    fold: bool = False,
    tied: str | None = None,
    min_gain: int | None = None,
    allow_shifted_outputs: bool = False,
    basis: str = "isometric",
    device: str = "cpu",
    max_shard_size: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    require_all: bool = False,
    merge_branches: bool = False,
    trust_remote_code: bool = False,
    limits: Mapping[str, float] | None = None,
    stream: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    stage: Stage | None = None,
) -> Report:
    """Convert the norms of a checkpoint and write the result to ``out``, complete or not at all.

    Args:
        src: hub id (``name``, ``org/name``, ``@revision``), folder, weight file, or ``demo:NAME``.
        out: the folder to make.
        method: a conversion, one of :data:`normconvert.options.METHODS`.
        revision: branch, tag or commit on the hub.
        arch: ``timm:NAME`` for bare weights; None: found by their names and shapes, if that is possible.
        dtype: store the weights in this dtype; ``auto`` keeps each tensor's own.
        fold: move the norms' weight and bias into the linear maps that read them, where each can take them.
        tied: ``center`` keeps an embedding that is also the output head and centres its output; ``untie`` makes two of
            it. None: ``center`` for rmsnorm, ``untie`` for crmsnorm.
        min_gain: insert a centring operation only where it wins at least this many norms. None: 3, for crmsnorm 2.
        allow_shifted_outputs: the per-token mean of returned hidden states may change.
        basis: how crmsnorm stores a stream in one channel less: ``isometric`` or ``paper``.
        device: where verification runs.
        max_shard_size: bytes a weight file; None keeps the source's files.
        overwrite: replace an ``out`` that exists, once the new one is complete.
        dry_run: plan only.
        verify: check the result numerically before ``out`` appears.
        require_all: refuse unless every norm can be converted.
        merge_branches: with ``fuse-bn``, make parallel convolutions and skips of a block one convolution.
        trust_remote_code: allow code that comes with the checkpoint to run.
        limits: figure of the verification -> limit, as in :mod:`normconvert.verification.limits`; those of ``algebra``
            and ``rounding`` may be narrower than what every conversion is held to, never wider.
        stream: fetch the shards of a model on the hub one by one and delete each when it is converted, so that the
            disk holds the output and one shard. Interrupted, it goes on where it stopped. Verified only if the disk
            has room for all shards.
        progress: called with (tensor, bytes done, bytes in all) while writing.
        stage: called with each stage's name as it begins.

    Returns:
        A report with the plan, the verdicts and the fidelity figures.

    Raises:
        InputError: bad input or usage.
        TraceError: the model cannot be traced.
        NothingToConvert: no norm, or with ``require_all`` not every norm, can be converted; its ``report`` has the
            verdicts.
        FidelityError: the result differs from the original; ``out`` was not made. Its ``report`` has the figures.
    """
    from normconvert.apply.output_folder import check_output, staged_output
    from normconvert.apply.shard_stream import streamed
    from normconvert.apply.source_reader import SourceReader
    from normconvert.verification.limits import check_limits

    check_method(method)
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    out = Path(out).expanduser()
    say = stage or (lambda name: None)
    local = Path(src).expanduser()
    limits = check_limits(limits or {})
    if limits and not verify:
        raise InputError(f"limits ({', '.join(limits)}) are held against the verification, which is switched off")
    if not dry_run:
        check_output(out, local if local.exists() else None, overwrite)
        if verify:
            check_device(device)
    options = Options(tied, min_gain, allow_shifted_outputs, fold, merge_branches=merge_branches, basis=basis)
    with ExitStack() as staged, ExitStack() as stack:  # what reads and copies ends before the output is in place
        remote = None
        if stream:
            remote = stack.enter_context(streamed(None if dry_run else out, overwrite, verify, stage))
        reader = stack.enter_context(SourceReader())  # it reads while this thread imports, builds and traces
        staging: list[Path] = []
        likely = (method, dtype, max_shard_size, fold) == ("rmsnorm", "auto", None, False)  # most bytes stay in place

        def found(tensors: Iterable[TensorInfo], folder: Path | None) -> None:
            tensors = list(tensors)
            place = folder or next((tensor.file for tensor in tensors), None)
            staging.append(staged.enter_context(staged_output(out, place, overwrite)))
            reader.begin(tensors, folder, staging[0] if likely else None)

        stack.enter_context(collecting(stream))  # a stream may take hours, all else seconds
        seen = None if dry_run or stream else found
        source, report = _plan(src, method, revision, arch, options, trust_remote_code, stage, seen, remote)
        _refuse_if_pointless(report, require_all)
        if dry_run:
            return report
        from normconvert.apply.checkpoint import write_checkpoint
        from normconvert.verification.running_statistics import check_statistics

        report = replace(report, notes=(*report.notes, *check_statistics(source, report.plan)))
        stored = _torch_dtype(dtype)
        report = replace(
            report,
            stored=report.stored if dtype == "auto" else dtype,
            options={**report.options, "dtype": dtype, "max_shard_size": max_shard_size},
        )
        seconds = dict(report.seconds)
        place: AbstractContextManager[Path] = nullcontext(staging[0]) if remote is None else remote.output(
            source, {**report.options, "plan": report.plan.to_json()}
        )  # fmt: skip
        with place as folder:
            say("write")
            start = time.perf_counter()
            written = write_checkpoint(
                source, report.plan, folder, dtype=stored, max_shard_size=max_shard_size, progress=progress,
                extra_files=loading_files(source, report.plan, dtype), reader=reader, stream=remote,
            )  # fmt: skip
            seconds["write"] = time.perf_counter() - start
            report = replace(
                report,
                out=str(out),
                bytes_written=written.bytes_written,
                tensors_edited=len(written.edited),
                tensors_copied=written.copied,
                seconds=seconds,
                notes=tuple(dict.fromkeys((*report.notes, *written.notes))),
            )
            write_record(folder, source, report, written.hashes)
            if verify and remote is not None and not remote.verifiable:
                verify = False
                report = replace(report, notes=(*report.notes, NO_ROOM))
            if verify:
                say("verify")
                start = time.perf_counter()
                with collecting(True):
                    fidelity = _fidelity(source, report.plan, folder, stored, device, limits)
                report = replace(report, fidelity=fidelity)
                seconds["verify"] = time.perf_counter() - start
                if report.fidelity is None or not report.fidelity.passed:
                    raise _with_report(FidelityError(_fidelity_message(report)), replace(report, out=None))
            write_record(folder, source, report, written.hashes)
            write_card(folder, source, report)
    return report


def _plan(
    src: str | Path,
    method: str,
    revision: str | None,
    arch: str | None,
    options: Options,
    trust_remote_code: bool,
    stage: Stage | None,
    found: Found | None = None,
    remote: Stream | None = None,
) -> tuple[Source, Report]:
    check_method(method)
    options.check()
    say = stage or (lambda name: None)
    say("open")
    start = time.perf_counter()
    from normconvert.sources import open_source

    if remote is not None:
        source = remote.open(str(src), revision, arch, trust_remote_code)
    else:
        source = open_source(str(src), revision=revision, arch=arch, trust_remote_code=trust_remote_code, found=found)
    model = source.skeleton()
    opened = time.perf_counter()
    say("trace")
    from normconvert.rewrites.planning import plan_model

    plan = plan_model(model, options, method)
    traced = time.perf_counter()
    return source, Report(
        source=str(src),
        library=source.library,
        architecture=source.architecture,
        method=method,
        out=None,
        plan=plan,
        dtype=str(source.dtype).removeprefix("torch."),
        stored=str(source.dtype).removeprefix("torch."),
        seconds={"open": opened - start, "trace": traced - opened},
        notes=(*source.notes, *plan.notes),
        options={**asdict(options), "revision": revision, "arch": arch},
    )


def _refuse_if_pointless(report: Report, require_all: bool) -> None:
    plan = report.plan
    if not plan.verdicts:
        message = f"{report.source}: nothing to do: {report.architecture} has no {METHODS[report.method]}"
        raise _with_report(NothingToConvert(message), report)
    from normconvert.wording.grouping import Row, collapse

    groups = collapse(Row(v.path, v.reason, v.kind) for v in plan.kept)
    times = [f" (×{group.count})" if group.count > 1 else "" for group in groups]
    reasons = "".join(f"\n  {group.name}{n}: {group.text}" for group, n in zip(groups, times, strict=True))
    if not plan.converted:
        message = f"{report.source}: none of {report.total} norms can be converted:{reasons}"
        raise _with_report(NothingToConvert(message), report)
    if require_all and plan.kept:
        message = f"{report.source}: {len(plan.kept)} of {report.total} norms cannot be converted:{reasons}"
        raise _with_report(NothingToConvert(message), report)


def _with_report(error: Failure, report: Report) -> Failure:
    """The error with the attribute ``report``: verdicts and figures for whoever catches it."""
    vars(error)["report"] = report
    return error


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _fidelity(
    source: Source, plan: Plan, folder: Path, stored: torch.dtype | None, device: str, limits: Mapping[str, float]
) -> Fidelity:
    import torch

    from normconvert.sources.converted import load
    from normconvert.tracing.probes import verification_inputs
    from normconvert.verification.equivalence import ROUNDING_TOLERANCE, tolerance_for, verify_models, watched_norms
    from normconvert.verification.limits import judge_limits

    dtype = stored or source.dtype
    shifted = next((n for n in plan.notes if n.startswith(SHIFTED)), "")
    trust = source.trust_remote_code
    probes = verification_inputs(source.skeleton(), seed=0, tokenizer=source.tokenizer())
    fidelity = verify_models(
        truth=lambda: source.load(dtype=torch.float64, device=device),
        algebra=None,
        plan=plan,
        original=lambda: source.load(dtype=dtype, device=device),
        converted=lambda: load(folder, dtype=dtype, device=device, trust_remote_code=trust),
        probes=probes,
        tolerance=min(tolerance_for(plan), limits.get("algebra", math.inf)),
        rounding_tolerance=min(ROUNDING_TOLERANCE, limits.get("rounding", math.inf)),
        converted_norms=watched_norms(plan),
        shifted_outputs=set(shifted.removeprefix(SHIFTED).split(", ")) - {""},
    )
    return judge_limits(fidelity, limits)


def _fidelity_message(report: Report) -> str:
    reasons = "; ".join(report.fidelity.reasons) if report.fidelity else "not verified"
    return f"{report.source}: the converted model differs from the original: {reasons}; nothing was written"
