"""``normconvert run``: the conversions of recipes."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.cli.app import MANY, Command, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import View
from normconvert.option_fields import option, parse_size

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen

AUTO = "auto"


class _RayMayStandAlone(Command):
    """``--ray`` takes an address or none: one follows if the next word looks like one and is no file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a ``--ray`` without an address the address ``auto``."""
        given = []
        for i, argument in enumerate(args):
            following = args[i + 1] if i + 1 < len(args) else "-"
            alone = argument == "--ray" and (following.startswith("-") or Path(following).suffix in (".yaml", ".yml"))
            given.append(f"--ray={AUTO}" if alone else argument)
        return super().parse_args(ctx, given)


@dataclass(frozen=True)
class Batching:
    """Which recipes are run, and where."""

    recipes: list[Path] = option(MISSING, "YAML files; see normconvert schema.", metavar="RECIPE...")
    jobs: int = option(1, "Processes at once, at most.", metavar="N", short="j", details={"min": 1})
    ray: str | None = option(
        None,
        "Run on a Ray cluster: host:port, ray://host:port, or none for RAY_ADDRESS or this machine's.",
        metavar="[ADDRESS]",
    )
    memory: int | None = option(
        None,
        "What the jobs may take together, such as 12GB; else what is free now.",
        metavar="SIZE", parse=parse_size,
    )  # fmt: skip
    force: bool = option(False, "Redo what is there and up to date.")
    dry_run: bool = option(False, "Show the jobs and what each would do.")


@register(cls=_RayMayStandAlone, short_help="Run the conversions of recipes (YAML files).", rich_help_panel=MANY)
@command(Batching, View)
def run(ask: Ask[Batching], view: View) -> int:
    """Run all conversions of recipes. Outputs that are there and up to date are skipped; a failure stops no other job.

    The exit status is the worst of the jobs': 1 before 2 before 3.
    """

    def action(screen: Screen) -> Done:
        asked = ask()
        from normconvert.recipes.batch import plan_recipes, run_batch
        from normconvert.recipes.table import show_batch, show_plan, watching
        from normconvert.report.screen import Done

        batch = plan_recipes(asked.recipes, force=asked.force)
        if not asked.dry_run:
            with watching(screen) as listen:
                run_batch(batch, jobs=asked.jobs, ray=asked.ray, memory=asked.memory, listen=listen)
            for entry in batch.entries if view.quiet else ():
                if entry.result is not None and entry.result.status == "failed":
                    screen.error(f"{entry.job.label}: {entry.result.message}")
        show = show_plan if asked.dry_run else show_batch
        return Done(
            {"command": "run", "dry_run": asked.dry_run, **batch.to_json()},
            lambda console: show(console, batch),
            batch.exit_status,
        )

    return view.run(action)
