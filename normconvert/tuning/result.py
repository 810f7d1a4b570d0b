"""What a swap did: the value that :func:`normconvert.swap` returns and the report shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normconvert import __version__
from normconvert.wording.words import human_number, percent

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan
    from normconvert.tuning.evaluation import Figures
    from normconvert.tuning.settings import Settings
    from normconvert.tuning.tails import Tail
    from normconvert.verification.fidelity import Fidelity


@dataclass(frozen=True)
class SwapReport:
    """What a swap did.

    Attributes:
        source: what the user named.
        library: ``transformers`` or ``timm``.
        architecture: class or model name.
        out: the output folder; None in a process that does not write.
        settings: what the user chose.
        swapped: paths of the norms that were swapped, in execution order.
        left: paths of the norms that still run in the output, swapped or not.
        attention: paths of the modules whose attention became linear.
        attention_left: path of a module whose attention stays -> why; of methods that swap attention.
        plan: module edits and verdicts of the output.
        figures: ``original``, ``calibrated``, ``tuned`` -> what it is worth on the evaluation data.
        eval_data: what that is, in words.
        tails: the worst losses beside the original's, for each set of data.
        fused: the fused model against the unfused one; None without fusing.
        steps: optimiser steps taken.
        trace: loss, agreement and λ over the steps.
        seconds: stage -> seconds it took.
        notes: sentences for the user.
    """

    source: str
    library: str
    architecture: str
    out: str | None
    settings: Settings
    swapped: tuple[str, ...]
    left: tuple[str, ...]
    plan: Plan
    figures: dict[str, Figures]
    eval_data: str
    tails: tuple[Tail, ...] = ()
    fused: Fidelity | None = None
    attention: tuple[str, ...] = ()
    attention_left: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    trace: tuple[dict[str, float], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method of the swap."""
        return self.settings.method

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "normconvert": __version__,
            "source": self.source,
            "library": self.library,
            "architecture": self.architecture,
            "out": self.out,
            "method": self.method,
            "settings": self.settings.to_json(),
            "norms": {"swapped": list(self.swapped), "left": list(self.left)},
            "attention": {"swapped": list(self.attention), "left": self.attention_left},
            "figures": {name: figures.to_json() for name, figures in self.figures.items()},
            "eval_data": self.eval_data,
            "tails": [tail.to_json() for tail in self.tails],
            "fused": self.fused.to_json() if self.fused else None,
            "steps": self.steps,
            "trace": list(self.trace),
            "seconds": self.seconds,
            "notes": list(self.notes),
            "plan": self.plan.to_json(),
        }


def in_words(report: SwapReport) -> dict[str, str]:
    """What was measured -> what was found, for the model card."""
    found = {"measured on": report.eval_data}
    for stage, one in report.figures.items():
        words = [f"{percent(one.agreement)} of the original's decisions"]
        words += [f"accuracy {percent(one.accuracy)}"] if one.accuracy is not None else []
        words += [f"perplexity {human_number(one.perplexity)}"] if one.perplexity is not None else []
        found[stage] = ", ".join(words)
    for tail in report.tails:
        found[f"losses on {tail.data}, {tail.unit}"] = tail.in_words()
    if report.fused is not None:
        found["fused against unfused, float64"] = f"{report.fused.algebra:.2g} (at most {report.fused.tolerance:.2g})"
    return found
