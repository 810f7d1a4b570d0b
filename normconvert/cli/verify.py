"""``normconvert verify``: how far one checkpoint is from another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.cli.app import AFTER, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import MEASURES, CiView, patient_threads
from normconvert.option_fields import option
from normconvert.options import TOLD
from normconvert.verification.requests import Verification

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@dataclass(frozen=True, kw_only=True)
class VerifyView(CiView):
    """Where the figures go, and what else a report shows."""

    bench: Path | None = option(
        None, "The JSON of `normconvert bench`, to show in the HTML report.", metavar="FILE", panel=TOLD
    )


@register(short_help="Measure how far one checkpoint is from another.", rich_help_panel=AFTER)
@command(Verification, VerifyView, said=MEASURES)
def verify(ask: Ask[Verification], view: VerifyView) -> int:
    """Measure how far checkpoint B is from checkpoint A; exit status 1 if it is too far."""

    def action(screen: Screen) -> Done:
        from normconvert.errors import InputError
        from normconvert.report.benchmark import read_benchmark
        from normconvert.report.screen import Done

        asked = ask()
        a, b = str(asked.a), str(asked.b)
        if asked.max_memory is not None and view.report_file is not None:
            raise InputError("--report measures every layer of whole models in memory: leave out --max-memory or it")
        timed = {"bench": read_benchmark(view.bench)} if view.bench is not None else {}
        stage = screen.stages(a, coming=("open", "verify"))
        stage("open")
        patient_threads()
        from normconvert.api import verify as verify_checkpoints
        from normconvert.options import check_device
        from normconvert.report.console import show_fidelity
        from normconvert.report.document import fidelity_document

        check_device(asked.device)
        stage("verify")
        fidelity = verify_checkpoints(**vars(ask(stage=stage)))
        found = view.measured(
            screen, a, b, device=asked.device, dtype=asked.dtype, trust_remote_code=asked.trust_remote_code,
            seed=asked.seed,
        )  # fmt: skip
        return Done(
            {**fidelity_document(a, b, fidelity), **found, **timed},
            lambda console: show_fidelity(
                console, a, b, fidelity, verbose=view.verbose > 0, measures=found.get("measures")
            ),
            0 if fidelity.passed else 1,
        )

    return view.run(action)
