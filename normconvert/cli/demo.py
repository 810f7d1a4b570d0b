"""``normconvert demo``: the embedded models, converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.cli.app import app
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import View
from normconvert.options import option

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@dataclass(frozen=True)
class Demonstration:
    """What is kept of a demonstration."""

    out: Path | None = option(
        None, "Keep the converted models here; else they are deleted.", metavar="OUT", positional=True
    )
    overwrite: bool = option(False, "Replace an OUT that exists, once the new one is whole.")


@app.command(short_help="Convert the embedded models and compare them.")
@command(Demonstration, View)
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
