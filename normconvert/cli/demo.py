"""``normconvert demo``: the embedded models, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normconvert.cli.app import app
from normconvert.cli.options import (
    Json,
    Overwrite,
    Quiet,
    ReportFile,
    Verbose,
    add_report,
    make_screen,
    measured,
)


@app.command(short_help="Convert the embedded models and compare them.")
def demo(
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Keep the converted models here; else they are deleted.")
    ] = None,
    overwrite: Overwrite = False,
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Convert the embedded models, verify them, and let the originals and the converted ones do the same work."""
    from normconvert.report.screen import execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)
    from normconvert.demos.run import run_demo

    def measure(source: str, converted: str) -> dict[str, Any]:
        return measured(screen, report_file, source, converted)

    return execute(screen, lambda: run_demo(screen, out, overwrite=overwrite, measure=measure))
