"""``normconvert inspect``: what would be converted. Writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.cli.app import BEFORE, register
from normconvert.cli.commands import Ask, command, spelled
from normconvert.cli.view import View
from normconvert.files.user_paths import STDOUT
from normconvert.option_fields import about
from normconvert.options import Inspection

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Show what would be converted, and why the rest would not.", rich_help_panel=BEFORE)
@command(Inspection, View)
def inspect(ask: Ask[Inspection], view: View) -> int:
    """Show the norms of a model, what would be converted, and why the rest would not. Writes nothing."""

    def action(screen: Screen) -> Done:
        asked = ask()
        _check(asked)
        if str(asked.anatomy) == STDOUT:
            _leave_stdout(screen)
        stage = screen.stages(str(asked.src))
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


def _leave_stdout(screen: Screen) -> None:
    """Let stdout hold the anatomy and nothing else, so that it can be piped into a parser.

    Raises:
        InputError: it is to hold the JSON report as well.
    """
    from normconvert.errors import InputError

    if screen.json_file == STDOUT:
        raise InputError("--anatomy - and --json - are two documents for one stdout: name a file for one of them")
    screen.out = screen.err


def _check(asked: Inspection) -> None:
    """Refuse an option of another conversion: what is shown would not be what it changes.

    Raises:
        InputError: names the option and the conversions that have it.
    """
    from normconvert.errors import InputError

    for name, default, known in about(Inspection):
        if known.methods and asked.method not in known.methods and getattr(asked, name) != default:
            option = spelled(name, known).partition("/")[0]
            raise InputError(
                f"{option} changes nothing in {asked.method}; it belongs to {', '.join(known.methods)}: "
                f"add --method {known.methods[0]}"
            )
