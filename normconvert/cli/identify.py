"""``normconvert identify``: which architecture a checkpoint is of. Writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.cli.app import BEFORE, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import Output
from normconvert.options import Identifying

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Find the architecture of bare weights.", rich_help_panel=BEFORE)
@command(Identifying, Output)
def identify(ask: Ask[Identifying], view: Output) -> int:
    """Find the architectures whose tensors have exactly these names and shapes, or the nearest and what differs.

    Exit status 2 if none fits.
    """

    def action(screen: Screen) -> Done:
        asked = ask()
        screen.stages(str(asked.path))("open")
        from normconvert.api import identify as identify_checkpoint
        from normconvert.report.identified import show_identification
        from normconvert.report.screen import Done

        found = identify_checkpoint(**vars(asked))
        return Done(
            {"command": "identify", **found.to_json()},
            lambda console: show_identification(console, found, verbose=view.verbose > 0),
            0 if found.exact else 2,
        )

    return view.run(action)
