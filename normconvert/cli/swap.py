"""``normconvert swap``: norms out, fixed statistics in, then fused away; or softmax attention out, linear in."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from normconvert.cli.app import CONVERSIONS, Command, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import View
from normconvert.tuning.settings import SWAPS, Swapping

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


class _MethodMayLead(Command):
    """``swap un SRC OUT``, as it used to be written, is ``swap --method un SRC OUT``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a method that stands before SRC and OUT its option's name."""
        options, left, _ = self.make_parser(ctx).parse_args(args=list(args))
        if len(left) == 1 and options.get("src") in SWAPS and options.get("method") is None:
            at = args.index(options["src"])
            args = ["--method", args[at], *args[:at], *args[at + 1 :]]
        return super().parse_args(ctx, args)


@register(
    cls=_MethodMayLead,
    short_help="Swap norms for learnt statistics, fused away, or softmax attention for a linear one.",
    rich_help_panel=CONVERSIONS,
)
@command(Swapping, View)
def swap(ask: Ask[Swapping], view: View) -> int:
    """Swap LayerNorms and RMSNorms for norms with fixed statistics, learn these from data, and fuse them away.

    Methods sla and slab swap the softmax attention of image models for a linear one, slab beside the norms.

    Not lossless: the report says what the output is worth beside the original. Several processes: accelerate launch.
    """
    if os.environ.get("RANK", "0") != "0":  # of the processes of accelerate, the first speaks
        view = replace(view, json=None, report_file=None, quiet=True)

    def action(screen: Screen) -> Done:
        from normconvert.report.screen import Done
        from normconvert.report.training import show_swap, stages_of, warn_on, watch_on

        asked = ask()
        stage = stages_of(screen, str(asked.src), str(asked.out))
        stage("open")
        from normconvert.tuning.swapping import swap as swap_norms

        report = swap_norms(**vars(ask(watch=watch_on(screen), stage=stage, warn=warn_on(screen))))
        if report.out is not None:
            screen.written.append(report.out)
        return Done({"command": "swap", **report.to_json()}, lambda console: show_swap(console, report))

    return view.run(action)
