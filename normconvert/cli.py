"""The command line: parse, call the Python API, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normconvert import __version__

if TYPE_CHECKING:
    from normconvert.report.screen import Screen

app = typer.Typer(
    name="normconvert",
    help="Convert the normalisation layers of trained models, exactly where that is possible.",
    epilog="Exit status: 0 done; 1 fidelity failed; 2 bad input or usage; 3 nothing could be converted.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: quick, and no option name is cut off at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


Src = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Hub id (org/name, @revision), folder, weight file with --arch, or demo:NAME."),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it appears complete or not at all.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")]
Arch = Annotated[str | None, typer.Option(metavar="timm:NAME", help="Architecture of bare weights.")]
Fold = Annotated[
    bool,
    typer.Option("--fold/--no-fold", help="Move the norms' weight and bias into what reads them."),
]
TiedTo = Annotated[
    Tied,
    typer.Option(
        help="An embedding that is also the output head: centre its output, or untie and centre a copy.",
    ),
]
MinGain = Annotated[
    int,
    typer.Option(metavar="N", help="Insert a centring only where it wins at least N norms."),
]
Shifted = Annotated[
    bool,
    typer.Option("--allow-shifted-outputs", help="The mean of returned hidden states may change."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with a checkpoint run.")]
RequireAll = Annotated[bool, typer.Option("--require-all", help="Refuse unless every norm can be converted.")]
StoredAs = Annotated[Dtype, typer.Option(help="Store the weights in this dtype.")]
RunIn = Annotated[Dtype, typer.Option(help="Run both in this dtype; auto is that of B's files.")]
ShardSize = Annotated[str | None, typer.Option(metavar="SIZE", help="Such as 5GB or 500MB; else as the source.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists, once the new one is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not check the result.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where the verification runs: cpu, cuda, cuda:1, mps.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write a JSON report; - for stdout."),
]
Verbose = Annotated[
    int,
    typer.Option(
        "-v", "--verbose", count=True, show_default=False, metavar="",
        help="List every norm, let the libraries speak; -vv adds tracebacks.",
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")]


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


@app.command(short_help="Turn LayerNorm into RMSNorm.")
def rmsnorm(
    src: Src,
    out: Out,
    revision: Revision = None,
    arch: Arch = None,
    dtype: StoredAs = Dtype.AUTO,
    fold: Fold = False,
    tied: TiedTo = Tied.CENTER,
    min_gain: MinGain = 3,
    allow_shifted_outputs: Shifted = False,
    require_all: RequireAll = False,
    trust_remote_code: Trust = False,
    max_shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    device: Device = "cpu",
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Turn every LayerNorm for which it is provably exact into RMSNorm, and write the checkpoint to OUT."""
    from normconvert.report.screen import Done, execute

    screen = _screen(json, verbose, quiet)

    def action() -> Done:
        shard_bytes = parse_size(max_shard_size) if max_shard_size is not None else None
        stage = screen.stages(src, str(out))
        stage("open")  # before anything heavy is imported
        from normconvert import convert
        from normconvert.report.console import show_summary
        from normconvert.report.document import report_document

        report = convert(
            src, out, "rmsnorm", revision=revision, arch=arch, dtype=dtype.value, fold=fold, tied=tied.value,
            min_gain=min_gain, allow_shifted_outputs=allow_shifted_outputs, device=device, max_shard_size=shard_bytes,
            overwrite=overwrite, dry_run=dry_run, verify=not no_verify, require_all=require_all,
            trust_remote_code=trust_remote_code, progress=screen.progress, stage=stage,
        )  # fmt: skip
        if report.out is not None:
            screen.written.append(report.out)
        return Done(
            report_document("rmsnorm", report), lambda console: show_summary(console, report, verbose=verbose > 0)
        )

    return execute(screen, action)


@app.command(short_help="Show what would be converted, and why the rest would not.")
def inspect(
    src: Src,
    revision: Revision = None,
    arch: Arch = None,
    fold: Fold = False,
    tied: TiedTo = Tied.CENTER,
    min_gain: MinGain = 3,
    allow_shifted_outputs: Shifted = False,
    trust_remote_code: Trust = False,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Show the norms of a model, what would be converted, and why the rest would not. Writes nothing."""
    from normconvert.report.screen import Done, execute

    screen = _screen(json, verbose, quiet)

    def action() -> Done:
        stage = screen.stages(src)
        stage("open")
        from normconvert import inspect as inspect_source
        from normconvert.report.console import show_inspection
        from normconvert.report.document import report_document

        report = inspect_source(
            src, revision=revision, arch=arch, fold=fold, tied=tied.value, min_gain=min_gain,
            allow_shifted_outputs=allow_shifted_outputs, trust_remote_code=trust_remote_code, stage=stage,
        )  # fmt: skip
        return Done(
            report_document("inspect", report), lambda console: show_inspection(console, report, verbose=verbose > 0)
        )

    return execute(screen, action)


@app.command(short_help="Measure how far one checkpoint is from another.")
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The original, as SRC of the other commands.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The converted one, or any other of the same model.")],
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: RunIn = Dtype.AUTO,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the probes.")] = 0,
    trust_remote_code: Trust = False,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how far checkpoint B is from checkpoint A; exit status 1 if it is too far."""
    from normconvert.report.screen import Done, execute

    screen = _screen(json, verbose, quiet)

    def action() -> Done:
        screen.say(f"comparing {b} with {a}")
        import torch

        from normconvert.api import check_device
        from normconvert.report.console import show_fidelity
        from normconvert.report.document import fidelity_document
        from normconvert.verification import verify as verify_checkpoints

        check_device(device)
        screen.hush_bars()
        fidelity = verify_checkpoints(
            a, b, device=device, dtype=None if dtype is Dtype.AUTO else getattr(torch, dtype.value),
            trust_remote_code=trust_remote_code, seed=seed,
        )  # fmt: skip
        return Done(
            fidelity_document(a, b, fidelity),
            lambda console: show_fidelity(console, a, b, fidelity, verbose=verbose > 0),
            0 if fidelity.passed else 1,
        )

    return execute(screen, action)


@app.command(short_help="Convert the embedded models and compare them.")
def demo(
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Keep the converted models here; else they are deleted.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Convert the embedded models, verify them, and let the originals and the converted ones do the same work."""
    from normconvert.report.screen import execute

    screen = _screen(json, verbose, quiet)
    from normconvert.demo import run_demo

    return execute(screen, lambda: run_demo(screen, out, overwrite=overwrite))


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number, as huggingface reads them (GB is 10⁹, GiB 2³⁰).

    Raises:
        InputError: it is none of these.
    """
    from normconvert.errors import InputError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?\s*", text.upper())
    size = 0
    if match:
        number, letter, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(letter) + 1 if letter else 0))
    if size < 1:
        raise InputError(f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size


def _screen(json: str | None, verbose: int, quiet: bool) -> Screen:
    from normconvert.report.screen import Screen

    screen = Screen(json_file=json, verbose=verbose, quiet=quiet)
    screen.hush()
    return screen


def run(arguments: Sequence[str]) -> int:
    """The exit status of ``normconvert *arguments``."""
    try:
        status: Any = app(list(arguments), prog_name="normconvert", standalone_mode=False)
    except Exception as error:
        # typer brings a click of its own, or uses the one installed: a usage error is known by what it can do.
        if not hasattr(error, "format_message"):
            raise
        return _usage_error(error, arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


def _usage_error(error: Any, arguments: Sequence[str]) -> int:
    from normconvert.report.document import error_document
    from normconvert.report.screen import Screen

    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "normconvert"
    message = f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"
    screen = Screen(json_file=_json_argument(arguments))
    screen.error(message)
    screen.document(error_document(message, 2))
    return 2


def _json_argument(arguments: Sequence[str]) -> str | None:
    """The value of --json in arguments that could not be parsed."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--json="):
            return argument.removeprefix("--json=")
        if argument == "--json" and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def main() -> None:
    """The entry point: ends the process with the exit status."""
    sys.exit(run(sys.argv[1:]))
