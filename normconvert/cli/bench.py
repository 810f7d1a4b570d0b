"""``normconvert bench``: how fast a model is beside its conversion and beside itself without its norms."""

from __future__ import annotations

from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import (
    Arch,
    Dtype,
    Json,
    Quiet,
    ReportFile,
    Revision,
    Src,
    Trust,
    Verbose,
    add_report,
    make_screen,
)

Numbers = str | None


@app.command(short_help="Measure what a conversion gains, or could gain.")
def bench(
    src: Src,
    out: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="Its conversion; without it, only what there is to gain is measured."),
    ] = None,
    batch: Annotated[Numbers, typer.Option(metavar="N,N", help="Batch sizes.  [default: 1,8]")] = None,
    length: Annotated[Numbers, typer.Option(metavar="N,N", help="Tokens.  [default: 32,512]")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Also under torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Also captured in CUDA graphs.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="For a causal language model: one token with a cache, too.")
    ] = True,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Run in this dtype; auto is that of SRC's files.")] = Dtype.AUTO,
    seconds: Annotated[float, typer.Option(metavar="S", help="For each row, but five rounds at least.")] = 3.0,
    threads: Annotated[int | None, typer.Option(metavar="N", help="On the CPU; else torch's choice.")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Without OUT: the conversion in question; else the first that applies."),
    ] = None,
    revision: Revision = None,
    arch: Arch = None,
    trust_remote_code: Trust = False,
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Time SRC beside OUT and beside itself without the norms in question, in turns.

    Nothing that only touches norms can be faster than the model without them.
    """
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)

    def action() -> Done:
        batches, lengths = _numbers("--batch", batch), _numbers("--length", length)
        screen.say(f"opening {src}")
        from normconvert.benchmark.bench import bench as run
        from normconvert.report.benchmark import benchmark_document, show_benchmark

        result = run(
            src, out, batch=batches, length=lengths, compile=compile, graphs=graphs, decode=decode, device=device,
            dtype=dtype.value, seconds=seconds, threads=threads, method=method, revision=revision, arch=arch,
            trust_remote_code=trust_remote_code, progress=screen.say,
        )  # fmt: skip
        return Done(benchmark_document(result), lambda console: show_benchmark(console, result, verbose=verbose > 0))

    return execute(screen, action)


def _numbers(option: str, text: str | None) -> list[int] | None:
    """``1,8`` as numbers.

    Raises:
        InputError: it is something else.
    """
    from normconvert.errors import InputError

    if text is None:
        return None
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {text}: expected numbers from 1 on, such as 1,8")
    return list(dict.fromkeys(int(part) for part in parts))
