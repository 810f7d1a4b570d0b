"""``normconvert demo``: the embedded models, converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.cli.app import SHOWN, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import MEASURES, View
from normconvert.option_fields import option
from normconvert.options import OVERWRITE

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@dataclass(frozen=True)
class Demonstration:
    """What is kept of a demonstration."""

    out: Path | None = option(
        None, "Keep the converted models here; else they are deleted.", metavar="OUT", positional=True
    )
    overwrite: bool = option(False, OVERWRITE)


@register(short_help="Convert the embedded models and compare them.", rich_help_panel=SHOWN)
@command(Demonstration, View, said=MEASURES)
def demo(ask: Ask[Demonstration], view: View) -> int:
    """Convert the embedded models, verify them, and let the originals and the converted ones do the same work."""

    def action(screen: Screen) -> Done:
        from normconvert.demos.run import run_demo

        asked = ask()
        return run_demo(
            screen,
            asked.out,
            overwrite=asked.overwrite,
            measure=lambda source, converted: view.measured(screen, source, converted),
        )

    return view.run(action)
