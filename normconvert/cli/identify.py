"""``normconvert identify``: which architecture a checkpoint is of. Writes nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from normconvert.cli.app import app
from normconvert.cli.options import Json, Quiet, Revision, Verbose, make_screen


@app.command(short_help="Find the architecture of bare weights.")
def identify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A weight file (safetensors or a pickle), a folder, or a hub id.")
    ],
    revision: Revision = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Find the architectures whose tensors have exactly these names and shapes, or the nearest and what differs.

    Exit status 2 if none fits.
    """
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)

    def action() -> Done:
        screen.stages(checkpoint)("open")
        from normconvert import identify as identify_checkpoint
        from normconvert.report.identified import show_identification

        found = identify_checkpoint(checkpoint, revision=revision)
        return Done(
            {"command": "identify", **found.to_json()},
            lambda console: show_identification(console, found, verbose=verbose > 0),
            0 if found.exact else 2,
        )

    return execute(screen, action)
