"""The arguments and options that several commands share: one type each, so that they mean the same everywhere."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normconvert.files.sizes import parse_size

if TYPE_CHECKING:
    from normconvert.report.screen import Screen

__all__ = ["parse_size"]


class Dtype(str, Enum):
    """How weights are stored, or models run."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Tied(str, Enum):
    """What happens to an embedding that is also the output head."""

    CENTER = "center"
    UNTIE = "untie"


class Basis(str, Enum):
    """How a mean-free stream is stored in one channel less."""

    ISOMETRIC = "isometric"
    PAPER = "paper"


class Method(str, Enum):
    """The conversions."""

    RMSNORM = "rmsnorm"
    CRMSNORM = "crmsnorm"
    FUSE_BN = "fuse-bn"


Src = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Hub id (org/name, @revision), folder, weight file, or demo:NAME."),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it appears complete or not at all.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")]
Arch = Annotated[
    str | None,
    typer.Option(metavar="timm:NAME", help="Architecture of bare weights; else found by their names and shapes."),
]
Fold = Annotated[
    bool,
    typer.Option("--fold/--no-fold", help="Move the norms' weight and bias into what reads them."),
]
TiedTo = Annotated[
    Tied | None,
    typer.Option(
        help="An embedding that is also the output head: centre its output, or untie it (default for crmsnorm).",
    ),
]
MinGain = Annotated[
    int | None,
    typer.Option(metavar="N", help="Insert an operation only where it wins at least N norms; 3, for crmsnorm 2."),
]
InBasis = Annotated[
    Basis,
    typer.Option(help="Store d - 1 numbers in an orthogonal basis, or as the paper: drop the last channel."),
]
For = Annotated[Method, typer.Option("--for", metavar="METHOD", help="The conversion to look at.")]
Shifted = Annotated[
    bool,
    typer.Option("--allow-shifted-outputs", help="The mean of returned hidden states may change."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with a checkpoint run.")]
RequireAll = Annotated[bool, typer.Option("--require-all", help="Refuse unless every norm can be converted.")]
StoredAs = Annotated[Dtype, typer.Option(help="Store the weights in this dtype.")]
RunIn = Annotated[Dtype, typer.Option(help="Run both in this dtype; auto is that of B's files.")]
ShardSize = Annotated[str | None, typer.Option(metavar="SIZE", help="Such as 5GB or 500MB; else as the source.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory", metavar="SIZE", help="Such as 4GB: leave the weights in their files and read them in turn."
    ),
]
Streamed = Annotated[
    bool,
    typer.Option("--stream", help="Fetch, convert and delete the shards on the hub one by one; goes on if stopped."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists, once the new one is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not check the result.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where the verification runs: cpu, cuda, cuda:1, mps.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write a JSON report; - for stdout."),
]
Junit = Annotated[str | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, for CI systems.")]
Markdown = Annotated[str | None, typer.Option("--markdown", metavar="FILE", help="Write a summary for pull requests.")]
Github = Annotated[bool, typer.Option("--github", help="Annotate the GitHub job that this runs in.")]
ReportFile = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE", help="Write an HTML report; measures every layer and norm for it."),
]
Verbose = Annotated[
    int,
    typer.Option(
        "-v", "--verbose", count=True, show_default=False, metavar="",
        help="List every norm, let the libraries speak; -vv adds tracebacks.",
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")]


def make_screen(json: str | None, verbose: int, quiet: bool) -> Screen:
    """Where a command prints, with the libraries hushed."""
    import shlex

    from normconvert.cli.app import ARGUMENTS
    from normconvert.report.screen import Screen

    command = shlex.join(["normconvert", *ARGUMENTS.get()])
    screen = Screen(json_file=json, verbose=verbose, quiet=quiet, command_line=command)
    screen.hush()
    return screen


def add_report(screen: Screen, file: str | None) -> None:
    """Have the command's result written as an HTML report as well."""
    from normconvert.report.outputs import FileOutput

    def render(document: dict[str, Any]) -> str:
        from normconvert.report.html import html_report

        return html_report(document)

    if file is not None:
        screen.outputs.append(FileOutput("--report", file, render))


def measured(screen: Screen, file: str | None, a: str, b: str | None, **options: Any) -> dict[str, Any]:
    """What a report needs beside the document of a command; nothing if none is wanted or nothing was written.

    Args:
        screen: of the command.
        file: the report, None for none.
        a: the original.
        b: the converted checkpoint, None for none.
        options: of :func:`normconvert.verification.layer_measures.measure`.
    """
    if file is None or b is None:
        return {}
    from normconvert.errors import NormConvertError
    from normconvert.verification.layer_measures import measure

    screen.say("measuring every layer")
    try:
        found = measure(a, b, **options)
    except NormConvertError as error:
        return {"measures_error": str(error)}
    return {"measures": found.to_json(), "plan": found.plan.to_json() if found.plan is not None else None}


def add_ci(screen: Screen, junit_file: str | None, markdown_file: str | None, annotate: bool) -> None:
    """Have the command's result written for a CI system as well."""
    from normconvert.report.github import github
    from normconvert.report.junit import junit
    from normconvert.report.markdown import markdown
    from normconvert.report.outputs import FileOutput

    for option, file, render in (("--junit", junit_file, junit), ("--markdown", markdown_file, markdown)):
        if file is not None:
            screen.outputs.append(FileOutput(option, file, render))
    screen.annotate = github if annotate else None
