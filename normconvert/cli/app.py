"""The command line's root: the application object that every command registers with."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated

import typer

from normconvert import __version__

ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("ARGUMENTS", default=())
"""What the user typed behind ``normconvert``, while a command runs."""

app = typer.Typer(
    name="normconvert",
    help="Convert the normalisation layers of trained models, exactly where that is possible.",
    epilog="Exit status: 0 done; 1 fidelity failed; 2 bad input or usage; 3 nothing could be converted.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: quick, and no option name is cut off at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normconvert {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
