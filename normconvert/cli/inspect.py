"""``normconvert inspect``: what would be converted. Writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.cli.app import app
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import View
from normconvert.options import Inspection

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@app.command(short_help="Show what would be converted, and why the rest would not.")
@command(Inspection, View)
def inspect(ask: Ask[Inspection], view: View) -> int:
    """Show the norms of a model, what would be converted, and why the rest would not. Writes nothing."""

    def action(screen: Screen) -> Done:
        stage = screen.stages(str(ask().src))
        stage("open")
        from normconvert.api import inspect as inspect_source
        from normconvert.report.console import show_inspection
        from normconvert.report.document import report_document
        from normconvert.report.screen import Done

        report = inspect_source(**vars(ask(stage=stage)))
        return Done(
            report_document("inspect", report),
            lambda console: show_inspection(console, report, verbose=view.verbose > 0),
        )

    return view.run(action)
