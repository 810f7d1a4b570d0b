"""``normconvert check``: is a converted checkpoint still what its record says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import (
    Github,
    Json,
    Junit,
    Markdown,
    Quiet,
    ReportFile,
    Revision,
    Trust,
    Verbose,
    add_ci,
    add_report,
    make_screen,
)


@app.command(short_help="Check a converted checkpoint against its source and plan, byte for byte.")
def check(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of a conversion.")],
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="What was converted; needed where that was a local folder or file."),
    ] = None,
    revision: Revision = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files not to compare, such as '*.txt'; not for weights. Repeatable."),
    ] = None,
    trust_remote_code: Trust = False,
    junit: Junit = None,
    markdown: Markdown = None,
    github: Github = False,
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Convert again as OUT's record says and compare every byte; exit status 1 if anything differs."""
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)
    add_ci(screen, junit, markdown, github)

    def action() -> Done:
        stages = {
            "open": "opening the source",
            "trace": "planning again",
            "replay": "converting again",
            "compare": f"comparing with {out}",
        }

        def stage(name: str) -> None:
            screen.say(stages[name])
            if name != "open":
                screen.hush_bars()

        screen.say(f"checking {out}")
        from normconvert import check as check_output
        from normconvert.report.console import show_check
        from normconvert.report.document import check_document

        report = check_output(
            out, source, revision=revision, ignore=ignore or (), trust_remote_code=trust_remote_code, stage=stage,
            progress=screen.progress,
        )  # fmt: skip
        return Done(
            check_document(report),
            lambda console: show_check(console, report, verbose=verbose > 0),
            0 if report.passed else 1,
        )

    return execute(screen, action)
