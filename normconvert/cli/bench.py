"""``normconvert bench``: how fast a model is beside its conversion and beside itself without its norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.benchmark.request import Benchmarking
from normconvert.cli.app import AFTER, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import View

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Measure what a conversion gains, or could gain.", rich_help_panel=AFTER)
@command(Benchmarking, View)
def bench(ask: Ask[Benchmarking], view: View) -> int:
    """Time SRC beside OUT and beside itself without the norms in question, in turns.

    Nothing that only touches norms can be faster than the model without them.
    """

    def action(screen: Screen) -> Done:
        asked = ask(progress=screen.say)
        screen.say(f"opening {asked.src}")
        from normconvert.benchmark.bench import bench as run
        from normconvert.report.benchmark import benchmark_document, show_benchmark
        from normconvert.report.screen import Done

        result = run(**vars(asked))
        return Done(
            benchmark_document(result), lambda console: show_benchmark(console, result, verbose=view.verbose > 0)
        )

    return view.run(action)
