"""The command line's root: the application object that every command registers with, and how its help is laid out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from normconvert import __version__
from normconvert.options import METHODS, TOLD

ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("ARGUMENTS", default=())
"""What the user typed behind ``normconvert``, while a command runs."""

CONVERSIONS, BEFORE, AFTER = "Conversions", "Before a conversion", "After it"
MANY, SHOWN = "Many at once", "To see it work"
"""Headings of the help under which commands stand."""

GUESSES = {
    "convert": f"a conversion is a command of its own: {', '.join(METHODS)}",
    "compare": "try verify",
    "diff": "try verify",
    "info": "try inspect",
    "show": "try inspect",
    "onnx": "try export",
    "train": "try swap",
}
"""What people type in place of a command -> what there is."""


class _Sections:
    """Of a command: options under the headings of their panels.

    rich's own panels cut names off at 80 columns, and take a quarter of a second.
    """

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        """Write arguments, options without a heading, and each heading's options, in the order of the request."""
        sections: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if parameter.name == "help" and TOLD in sections:
                kind = TOLD
            heading = getattr(parameter, "rich_help_panel", None) or kind
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(heading, []).append(record)
        _write(formatter, sections.items())
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)


def _write(formatter: Any, sections: Iterable[tuple[str, list[Any]]]) -> None:
    for heading, rows in sections:
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


class Command(_Sections, TyperCommand):
    """A command, its help in sections."""


class Group(_Sections, TyperGroup):
    """The commands, under their headings; a name that is none is answered with what was probably meant."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands heading by heading."""
        sections: dict[str, list[Any]] = {heading: [] for heading in (CONVERSIONS, BEFORE, AFTER, MANY, SHOWN)}
        width = formatter.width - 6 - max(map(len, self.commands))
        for name, command in self.commands.items():
            row = (name, command.get_short_help_str(width))
            sections.setdefault(str(getattr(command, "rich_help_panel", None) or "Commands"), []).append(row)
        _write(formatter, sections.items())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse a name that is no command, with a hint."""
        name = args[0]
        if not name.startswith("-") and name not in self.commands and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self.commands, 1)
            hint = GUESSES.get(name) or (f"did you mean {near[0]}?" if near else "")
            if not hint and ("/" in name or ":" in name):
                hint = f"the command comes first, such as inspect {name}"
            ctx.fail(f"no such command {name!r}{hint and ': '}{hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="normconvert",
    cls=Group,
    help="Convert the normalisation layers of trained models, exactly where that is possible.",
    epilog="Exit status: 0 done; 1 fidelity failed; 2 bad input or usage; 3 nothing could be converted.",
    rich_markup_mode=None,  # plain help: quick, and no option name is cut off at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
register: Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]] = partial(app.command, cls=Command)
"""``app.command`` with help in sections; ``rich_help_panel`` is the command's heading."""


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
