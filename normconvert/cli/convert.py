"""The conversions of LayerNorm: read a checkpoint, write another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normconvert.cli.app import app
from normconvert.cli.options import (
    Arch,
    Basis,
    Device,
    DryRun,
    Dtype,
    Fold,
    InBasis,
    Json,
    MinGain,
    NoVerify,
    Out,
    Overwrite,
    Quiet,
    ReportFile,
    RequireAll,
    Revision,
    ShardSize,
    Shifted,
    Src,
    StoredAs,
    Streamed,
    TiedTo,
    Trust,
    Verbose,
    add_report,
    make_screen,
    measured,
    parse_size,
)
from normconvert.tracing.garbage import collecting


@app.command(short_help="Turn LayerNorm into RMSNorm.")
def rmsnorm(
    src: Src,
    out: Out,
    revision: Revision = None,
    arch: Arch = None,
    dtype: StoredAs = Dtype.AUTO,
    fold: Fold = False,
    tied: TiedTo = None,
    min_gain: MinGain = None,
    allow_shifted_outputs: Shifted = False,
    require_all: RequireAll = False,
    trust_remote_code: Trust = False,
    max_shard_size: ShardSize = None,
    stream: Streamed = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    device: Device = "cpu",
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Turn every LayerNorm for which it is provably exact into RMSNorm, and write the checkpoint to OUT."""
    return _convert(
        "rmsnorm", src, out, max_shard_size, json, verbose, quiet, report_file, revision=revision, arch=arch,
        dtype=dtype.value,
        fold=fold, tied=tied and tied.value, min_gain=min_gain, allow_shifted_outputs=allow_shifted_outputs,
        device=device, overwrite=overwrite, dry_run=dry_run, verify=not no_verify, require_all=require_all,
        trust_remote_code=trust_remote_code, stream=stream,
    )  # fmt: skip


@app.command(short_help="Turn LayerNorm into RMSNorm on a stream of one channel less.")
def crmsnorm(
    src: Src,
    out: Out,
    basis: InBasis = Basis.ISOMETRIC,
    revision: Revision = None,
    arch: Arch = None,
    dtype: StoredAs = Dtype.AUTO,
    tied: TiedTo = None,
    min_gain: MinGain = None,
    require_all: RequireAll = False,
    trust_remote_code: Trust = False,
    max_shard_size: ShardSize = None,
    stream: Streamed = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    device: Device = "cpu",
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Store every stream that provably allows it in one channel less, its LayerNorms as CRMSNorm, and write it to OUT.

    The result loads by normconvert.load or trust_remote_code only: tensors have other shapes.
    """
    return _convert(
        "crmsnorm", src, out, max_shard_size, json, verbose, quiet, report_file, basis=basis.value, revision=revision,
        arch=arch, dtype=dtype.value, tied=tied and tied.value, min_gain=min_gain, device=device, overwrite=overwrite,
        dry_run=dry_run, verify=not no_verify, require_all=require_all, trust_remote_code=trust_remote_code,
        stream=stream,
    )  # fmt: skip


def _convert(
    method: str,
    src: str,
    out: Path,
    max_shard_size: str | None,
    json: str | None,
    verbose: int,
    quiet: bool,
    report_file: str | None,
    **options: Any,
) -> int:
    """Run a conversion with ``options`` of :func:`normconvert.convert`, and show what came of it."""
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)

    def action() -> Done:
        shard_bytes = parse_size(max_shard_size) if max_shard_size is not None else None
        stage = screen.stages(src, str(out))
        stage("open")  # before anything heavy is imported
        from normconvert import convert
        from normconvert.report.console import show_summary
        from normconvert.report.document import report_document

        report = convert(
            src, out, method, max_shard_size=shard_bytes, progress=screen.progress, stage=stage, **options
        )  # fmt: skip
        if report.out is not None:
            screen.written.append(report.out)
        with collecting(report_file is not None):  # it runs models
            found = measured(
                screen, report_file, src, report.out, revision=options.get("revision"), arch=options.get("arch"),
                device=str(options.get("device", "cpu")), trust_remote_code=bool(options.get("trust_remote_code")),
            )  # fmt: skip
        return Done(
            {**found, **report_document(method, report)},
            lambda console: show_summary(console, report, verbose=verbose > 0, measures=found.get("measures")),
        )

    return execute(screen, action)
