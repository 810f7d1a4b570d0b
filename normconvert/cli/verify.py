"""``normconvert verify``: how far one checkpoint is from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import (
    Dtype,
    Github,
    Json,
    Junit,
    Markdown,
    MaxMemory,
    Quiet,
    ReportFile,
    RunIn,
    Trust,
    Verbose,
    add_ci,
    add_report,
    make_screen,
    measured,
    parse_size,
)


@app.command(short_help="Measure how far one checkpoint is from another.")
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The original, as SRC of the other commands.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The converted one, or any other of the same model.")],
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: RunIn = Dtype.AUTO,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the probes.")] = 0,
    trust_remote_code: Trust = False,
    max_memory: MaxMemory = None,
    limits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: figure and limit, instead of the default limits.")
    ] = None,
    junit: Junit = None,
    markdown: Markdown = None,
    github: Github = False,
    report_file: ReportFile = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The JSON of `normconvert bench`, to show in the HTML report.")
    ] = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how far checkpoint B is from checkpoint A; exit status 1 if it is too far."""
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)
    add_ci(screen, junit, markdown, github)

    def action() -> Done:
        from normconvert.errors import InputError
        from normconvert.report.benchmark import read_benchmark
        from normconvert.verification.limits import read_limits

        allowed = parse_size(max_memory, "--max-memory") if max_memory is not None else None
        if allowed is not None and report_file is not None:
            raise InputError("--report measures every layer of whole models in memory: leave out --max-memory or it")
        wanted = read_limits(limits) if limits is not None else {}
        timed = {"bench": read_benchmark(bench)} if bench is not None else {}
        screen.say(f"comparing {b} with {a}")
        import torch

        from normconvert.options import check_device
        from normconvert.report.console import show_fidelity
        from normconvert.report.document import fidelity_document
        from normconvert.verification.equivalence import verify as verify_checkpoints

        check_device(device)
        run_in = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
        screen.hush_bars()
        fidelity = verify_checkpoints(
            a, b, device=device, dtype=run_in,
            trust_remote_code=trust_remote_code, seed=seed, limits=wanted, max_memory=allowed,
        )  # fmt: skip
        found = measured(
            screen, report_file, a, b, device=device, dtype=run_in,
            trust_remote_code=trust_remote_code, seed=seed,
        )  # fmt: skip
        return Done(
            {**fidelity_document(a, b, fidelity), **found, **timed},
            lambda console: show_fidelity(console, a, b, fidelity, verbose=verbose > 0, measures=found.get("measures")),
            0 if fidelity.passed else 1,
        )

    return execute(screen, action)
