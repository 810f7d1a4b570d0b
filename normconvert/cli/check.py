"""``normconvert check``: is a converted checkpoint still what its record says?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.cli.app import AFTER, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import CiView
from normconvert.verification.requests import Checking

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Check a converted checkpoint against its source and plan, byte for byte.", rich_help_panel=AFTER)
@command(Checking, CiView)
def check(ask: Ask[Checking], view: CiView) -> int:
    """Convert again as OUT's record says and compare every byte; exit status 1 if anything differs."""

    def action(screen: Screen) -> Done:
        out = ask().out
        stages = {
            "open": "opening the source",
            "trace": "planning again",
            "replay": "converting again",
            "compare": f"comparing with {out}",
            "verify": "measuring again",
        }

        def stage(name: str) -> None:
            screen.say(stages[name])
            if name != "open":
                screen.hush_bars()

        screen.say(f"checking {out}")
        from normconvert.report.console import show_check
        from normconvert.report.document import check_document
        from normconvert.report.screen import Done
        from normconvert.verification.record_check import check as check_output

        report = check_output(**vars(ask(stage=stage, progress=screen.progress)))
        return Done(
            check_document(report),
            lambda console: show_check(console, report, verbose=view.verbose > 0),
            0 if report.passed else 1,
        )

    return view.run(action)
