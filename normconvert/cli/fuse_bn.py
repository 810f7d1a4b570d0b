"""``normconvert fuse-bn``: BatchNorm and its kin vanish into the linear maps beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import (
    Arch,
    Device,
    DryRun,
    Dtype,
    Json,
    NoVerify,
    Overwrite,
    Quiet,
    ReportFile,
    RequireAll,
    Revision,
    ShardSize,
    Src,
    StoredAs,
    Streamed,
    Trust,
    Verbose,
    add_report,
    make_screen,
    measured,
    parse_size,
)

OptionalOut = Annotated[
    Path | None,
    typer.Argument(metavar="[OUT]", help="The folder to make; for a weight file, NAME-fused beside it if left out."),
]

MergeBranches = Annotated[
    bool,
    typer.Option("--merge-branches", help="Make parallel convolutions and skips of a block one convolution."),
]


@app.command("fuse-bn", short_help="Fuse BatchNorm into the layers beside it.")
def fuse_bn(
    src: Src,
    out: OptionalOut = None,
    revision: Revision = None,
    arch: Arch = None,
    dtype: StoredAs = Dtype.AUTO,
    merge_branches: MergeBranches = False,
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
    """Move every BatchNorm (and frozen or similar norm) into the convolutions and linears beside it, exactly."""
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)

    def action() -> Done:
        folder = out or beside(src)
        shard_bytes = parse_size(max_shard_size) if max_shard_size is not None else None
        stage = screen.stages(src, str(folder))
        stage("open")  # before anything heavy is imported
        from normconvert import convert
        from normconvert.report.console import show_summary
        from normconvert.report.document import report_document

        report = convert(
            src, folder, "fuse-bn", revision=revision, arch=arch, dtype=dtype.value, device=device,
            max_shard_size=shard_bytes, overwrite=overwrite, dry_run=dry_run, verify=not no_verify,
            require_all=require_all, merge_branches=merge_branches, trust_remote_code=trust_remote_code, stream=stream,
            progress=screen.progress, stage=stage,
        )  # fmt: skip
        if report.out is not None:
            screen.written.append(report.out)
        found = measured(
            screen, report_file, src, report.out, revision=revision, arch=arch, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return Done(
            {**found, **report_document("fuse-bn", report)},
            lambda console: show_summary(console, report, verbose=verbose > 0, measures=found.get("measures")),
        )

    return execute(screen, action)


def beside(src: str) -> Path:
    """``ckpt-fused`` beside ``ckpt.safetensors``.

    Raises:
        InputError: SRC is not a weight file.
    """
    from normconvert.errors import InputError

    path = Path(src).expanduser()
    if not path.is_file():
        raise InputError(f"OUT is missing: only for a weight file is it made up; try `normconvert fuse-bn {src} OUT`")
    return path.with_name(f"{path.stem}-fused")
