"""``normconvert export``: one file that runs without normconvert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.cli.app import AFTER, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import View
from normconvert.exporting.request import Export

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Write an ONNX file or a torch.export program.", rich_help_panel=AFTER)
@command(Export, View)
def export(ask: Ask[Export], view: View) -> int:
    """Export a checkpoint, converted or not, to a file that needs no normconvert; verified before it appears."""

    def action(screen: Screen) -> Done:
        asked = ask()
        screen.say(f"exporting {asked.src}")
        from normconvert.exporting.export import export as export_model
        from normconvert.report.console import show_export
        from normconvert.report.screen import Done

        report = export_model(**vars(asked))
        screen.written.append(report.file)
        return Done({"command": "export", **report.to_json()}, lambda console: show_export(console, report))

    return view.run(action)
