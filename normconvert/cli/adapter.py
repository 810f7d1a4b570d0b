"""``normconvert adapter``: a PEFT adapter of the original, for the converted checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.adapters.request import AdapterConversion
from normconvert.cli.app import AFTER, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import Output

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Convert a PEFT adapter of the original.", rich_help_panel=AFTER)
@command(AdapterConversion, Output)
def adapter(ask: Ask[AdapterConversion], view: Output) -> int:
    """Convert a PEFT adapter of the original for the converted checkpoint; verified before it appears."""

    def action(screen: Screen) -> Done:
        asked = ask()
        screen.say(f"converting the adapter {asked.adapter}")
        from normconvert.adapters.conversion import convert_adapter
        from normconvert.report.console import show_adapter
        from normconvert.report.screen import Done

        report = convert_adapter(**vars(asked))
        return Done({"command": "adapter", **report.to_json()}, lambda console: show_adapter(console, report))

    return view.run(action)
