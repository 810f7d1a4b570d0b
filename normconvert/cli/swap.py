"""``normconvert swap``: LayerNorm out, a norm with fixed statistics in, then fused away."""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import (
    Arch,
    Device,
    Json,
    Out,
    Overwrite,
    Quiet,
    ReportFile,
    Revision,
    Src,
    Trust,
    Verbose,
    add_report,
    make_screen,
)


class Swap(str, Enum):
    """What LayerNorm is swapped for."""

    UN = "un"
    REPBN = "repbn"
    POWERNORM = "powernorm"
    LN_FREE = "ln-free"


class Objective(str, Enum):
    """What is learnt."""

    DISTILL = "distill"
    TASK = "task"


class Schedule(str, Enum):
    """How the old norms fade or go."""

    LINEAR = "linear"
    COSINE = "cosine"
    NONE = "none"


class Precision(str, Enum):
    """What the networks compute in."""

    NO = "no"
    BF16 = "bf16"


DATA_HELP = (
    "imagefolder:DIR, text:FILE, parquet:FILE[:COLUMN], hf:NAME[:SPLIT][:COLUMN], npz:FILE, safetensors:FILE, or demo: "
    "for the embedded models' own."
)


@app.command(short_help="Swap LayerNorm for a norm with learnt statistics, and fuse it away.")
def swap(
    method: Annotated[
        Swap,
        typer.Argument(
            metavar="METHOD", help="un (Unified Normalization), repbn, powernorm or ln-free.", show_default=False
        ),
    ],
    src: Src,
    out: Out,
    data: Annotated[str, typer.Option(metavar="KIND:WHERE", help=DATA_HELP)],
    eval_data: Annotated[
        str | None, typer.Option(metavar="KIND:WHERE", help="Measure on this; else on a part of --data held back.")
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="Learn from the original's outputs, or from the labels of the data.")
    ] = Objective.DISTILL,
    norms: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Swap the norms at these paths only; may be repeated.")
    ] = None,
    schedule: Annotated[
        Schedule, typer.Option(help="How the old norms fade or go in the first half of the steps; none: at once.")
    ] = Schedule.LINEAR,
    steps: Annotated[int, typer.Option(metavar="N", help="Optimiser steps.")] = 1000,
    calibrate_only: Annotated[
        bool, typer.Option("--calibrate-only", help="Set the statistics from one pass; train nothing.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Examples a step and process.")] = 32,
    accumulate: Annotated[int, typer.Option(metavar="N", help="Batches a step.")] = 1,
    lr: Annotated[float, typer.Option(metavar="X", help="Peak learning rate of AdamW.")] = 1e-3,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens an example of text; at most 256.")] = None,
    calibration: Annotated[int, typer.Option(metavar="N", help="Examples for the first statistics.")] = 256,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of the examples.")] = 0,
    max_minutes: Annotated[
        float | None, typer.Option(metavar="X", help="End earlier, the schedule fitted to the time.")
    ] = None,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Move the swapped norms into what reads them.")] = True,
    mixed_precision: Annotated[Precision, typer.Option(help="Train in bfloat16 where that is safe.")] = Precision.NO,
    window: Annotated[int, typer.Option(metavar="M", help="un: batches whose statistics are smoothed.")] = 4,
    filtration: Annotated[
        bool, typer.Option("--filtration/--no-filtration", help="un: leave outlier batches out.")
    ] = True,
    checkpoint_every: Annotated[
        int, typer.Option(metavar="N", help="Steps between two saved states in OUT.training; 0: none.")
    ] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    tensorboard: Annotated[str | None, typer.Option(metavar="DIR", help="Write a TensorBoard log.")] = None,
    revision: Revision = None,
    arch: Arch = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Swap LayerNorms for norms with fixed statistics, learn these from data, and fuse the norms into their readers.

    Not lossless: the report says what the output is worth beside the original. Several processes: accelerate launch.
    """
    from normconvert.report.screen import Done, execute

    # of the processes of accelerate, the first speaks
    others = os.environ.get("RANK", "0") != "0"
    screen = make_screen(None if others else json, verbose, quiet or others)
    add_report(screen, None if others else report_file)

    def action() -> Done:
        from normconvert.report.training import show_swap, stages_of, warn_on, watch_on

        stage = stages_of(screen, src, str(out))
        stage("open")
        from normconvert import swap as swap_norms

        report = swap_norms(
            src, out, method.value, data=data, fuse=fuse, resume=resume, device=device, revision=revision, arch=arch,
            trust_remote_code=trust_remote_code, overwrite=overwrite, tensorboard=tensorboard, watch=watch_on(screen),
            stage=stage, warn=warn_on(screen), eval_data=eval_data, objective=objective.value, norms=tuple(norms or ()),
            schedule=schedule.value, steps=0 if calibrate_only else steps, batch_size=batch_size,
            accumulate=accumulate, lr=lr, length=length, calibration=calibration, seed=seed, max_minutes=max_minutes,
            mixed_precision=mixed_precision.value, window=window, filtration=filtration,
            batches_between_checkpoints=checkpoint_every,
        )  # fmt: skip
        if report.out is not None:
            screen.written.append(report.out)
        return Done({"command": "swap", **report.to_json()}, lambda console: show_swap(console, report))

    return execute(screen, action)
