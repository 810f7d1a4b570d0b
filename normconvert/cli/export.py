"""``normconvert export``: one file that runs without normconvert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import Json, Overwrite, Quiet, ReportFile, Src, Trust, Verbose, add_report, make_screen


@app.command(short_help="Write an ONNX file or a torch.export program.")
def export(
    src: Src,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="model.onnx, or model.pt2 for torch.export.")],
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="Compare with the original checkpoint as well.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Export a checkpoint, converted or not, to a file that needs no normconvert; verified before it appears."""
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)

    def action() -> Done:
        screen.say(f"exporting {src}")
        from normconvert.exporting.export import export as export_model
        from normconvert.report.console import show_export

        report = export_model(
            src, file, against=against, overwrite=overwrite, trust_remote_code=trust_remote_code
        )  # fmt: skip
        screen.written.append(report.file)
        return Done({"command": "export", **report.to_json()}, lambda console: show_export(console, report))

    return execute(screen, action)
