"""``normconvert run``: the conversions of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from normconvert.cli.app import app
from normconvert.cli.options import Json, Quiet, ReportFile, Verbose, add_report, make_screen, parse_size

AUTO = "auto"


class _RayMayStandAlone(TyperCommand):
    """``--ray`` takes an address or none: one follows if the next word looks like one and is no file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a ``--ray`` without an address the address ``auto``."""
        given = []
        for i, argument in enumerate(args):
            following = args[i + 1] if i + 1 < len(args) else "-"
            alone = argument == "--ray" and (following.startswith("-") or Path(following).suffix in (".yaml", ".yml"))
            given.append(f"--ray={AUTO}" if alone else argument)
        return super().parse_args(ctx, given)


@app.command(cls=_RayMayStandAlone, short_help="Run the conversions of recipes (YAML files).")
def run(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="YAML files; see normconvert schema.", show_default=False)
    ],
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", min=1, help="Processes at once, at most.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Run on a Ray cluster: host:port, ray://host:port, or none for RAY_ADDRESS or this machine's.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What the jobs may take together, such as 12GB; else what is free now."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Redo what is there and up to date.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the jobs and what each would do.")] = False,
    report_file: ReportFile = None,
    json: Json = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Run all conversions of recipes. Outputs that are there and up to date are skipped; a failure stops no other job.

    The exit status is the worst of the jobs': 1 before 2 before 3.
    """
    from normconvert.report.screen import Done, execute

    screen = make_screen(json, verbose, quiet)
    add_report(screen, report_file)

    def action() -> Done:
        budget = parse_size(memory, "--memory") if memory is not None else None
        from normconvert.recipes.batch import plan_recipes, run_batch
        from normconvert.recipes.table import show_batch, show_plan, watching

        batch = plan_recipes(recipes, force=force)
        if not dry_run:
            with watching(screen) as listen:
                run_batch(batch, jobs=jobs, ray=ray, memory=budget, listen=listen)
            for entry in batch.entries if quiet else ():
                if entry.result is not None and entry.result.status == "failed":
                    screen.error(f"{entry.job.label}: {entry.result.message}")
        show = show_plan if dry_run else show_batch
        return Done(
            {"command": "run", "dry_run": dry_run, **batch.to_json()},
            lambda console: show(console, batch),
            batch.exit_status,
        )

    return execute(screen, action)
