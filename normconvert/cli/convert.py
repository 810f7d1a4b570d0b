"""The conversions: read a checkpoint, write another one."""

from __future__ import annotations

from normconvert.cli.app import app
from normconvert.cli.options import (
    Arch,
    Device,
    DryRun,
    Dtype,
    Fold,
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
    Tied,
    TiedTo,
    Trust,
    Verbose,
    add_report,
    make_screen,
    measured,
    parse_size,
)


@app.command(short_help="Turn LayerNorm into RMSNorm.")
def rmsnorm(
    src: Src,
    out: Out,
    revision: Revision = None,
    arch: Arch = None,
    dtype: StoredAs = Dtype.AUTO,
    fold: Fold = False,
    tied: TiedTo = Tied.CENTER,
    min_gain: MinGain = 3,
    allow_shifted_outputs: Shifted = False,
    require_all: RequireAll = False,
    trust_remote_code: Trust = False,
    max_shard_size: ShardSize = None,
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
            src, out, "rmsnorm", revision=revision, arch=arch, dtype=dtype.value, fold=fold, tied=tied.value,
            min_gain=min_gain, allow_shifted_outputs=allow_shifted_outputs, device=device, max_shard_size=shard_bytes,
            overwrite=overwrite, dry_run=dry_run, verify=not no_verify, require_all=require_all,
            trust_remote_code=trust_remote_code, progress=screen.progress, stage=stage,
        )  # fmt: skip
        if report.out is not None:
            screen.written.append(report.out)
        found = measured(
            screen, report_file, src, report.out, revision=revision, arch=arch, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return Done(
            {**found, **report_document("rmsnorm", report)},
            lambda console: show_summary(console, report, verbose=verbose > 0, measures=found.get("measures")),
        )

    return execute(screen, action)
