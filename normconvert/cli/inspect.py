"""``normconvert inspect``: what would be converted. Writes nothing."""

from __future__ import annotations

from normconvert.cli.app import app
from normconvert.cli.options import (
    Arch,
    Basis,
    Fold,
    For,
    InBasis,
    Json,
    Method,
    MinGain,
    Quiet,
    ReportFile,
    Revision,
    Shifted,
    Src,
    TiedTo,
    Trust,
    Verbose,
    add_report,
    make_screen,
)


@app.command(short_help="Show what would be converted, and why the rest would not.")
def inspect(
    src: Src,
    method: For = Method.RMSNORM,
    revision: Revision = None,
    arch: Arch = None,
    fold: Fold = False,
    tied: TiedTo = None,
    min_gain: MinGain = None,
    allow_shifted_outputs: Shifted = False,
    basis: InBasis = Basis.ISOMETRIC,
    trust_remote_code: Trust = False,
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Show the norms of a model, what would be converted, and why the rest would not. Writes nothing."""
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)

    def action() -> Done:
        stage = screen.stages(src)
        stage("open")
        from normconvert import inspect as inspect_source
        from normconvert.report.console import show_inspection
        from normconvert.report.document import report_document

        report = inspect_source(
            src, method.value, revision=revision, arch=arch, fold=fold, tied=tied and tied.value, min_gain=min_gain,
            allow_shifted_outputs=allow_shifted_outputs, basis=basis.value, trust_remote_code=trust_remote_code,
            stage=stage,
        )  # fmt: skip
        return Done(
            report_document("inspect", report), lambda console: show_inspection(console, report, verbose=verbose > 0)
        )

    return execute(screen, action)
