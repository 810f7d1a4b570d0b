"""What a conversion comes to, of files and of models in memory alike: refused with its reasons, or with its figures."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from normconvert.errors import FidelityError, NormConvertError, NothingToConvert
from normconvert.options import METHODS, Options
from normconvert.plan.conversion_plan import Plan
from normconvert.result import Report
from normconvert.rewrites.planning import difference_later
from normconvert.tracing.graph import Graph
from normconvert.verification.fidelity import Fidelity
from normconvert.wording.grouping import Row, collapse
from normconvert.wording.words import with_changes

Failure = TypeVar("Failure", bound=NormConvertError)


def refuse_if_pointless(report: Report, require_all: bool) -> None:
    """Raise where there is nothing to convert, or not all.

    Raises:
        NothingToConvert: no norm, or with ``require_all`` not every norm, can be converted; it has the ``report``.
    """
    plan = report.plan
    if not plan.verdicts:
        message = f"{report.source}: nothing to do: {report.architecture} has no {METHODS[report.method]}"
        message += "".join(f"\n  {other}" for other in report.others)
        raise with_report(NothingToConvert(message), report)
    groups = collapse(Row(v.path, v.reason, v.kind) for v in plan.kept)
    times = [f" (×{group.count})" if group.count > 1 else "" for group in groups]
    reasons = "".join(f"\n  {group.name}{n}: {group.text}" for group, n in zip(groups, times, strict=True))
    if not plan.converted:
        message = f"{report.source}: none of {report.total} norms can be converted:{reasons}"
        raise with_report(NothingToConvert(message), report)
    if require_all and plan.kept:
        message = f"{report.source}: {len(plan.kept)} of {report.total} norms cannot be converted:{reasons}"
        raise with_report(NothingToConvert(message), report)


def with_difference(fidelity: Fidelity, graph: Graph, plan: Plan, options: Options) -> Fidelity:
    """The figures, failed if the edited model's graph is not that of the original, ``graph``."""
    if why := difference_later(graph, plan, options):
        reasons = [f"the edited model is not the old one: {why}", *fidelity.reasons]
        return replace(fidelity, passed=False, reasons=reasons)
    return fidelity


def with_fidelity(report: Report, fidelity: Fidelity, undone: str) -> Report:
    """The report with what the verification found.

    Args:
        report: of the conversion.
        fidelity: what was found.
        undone: how it ends, if the two models differ: ``nothing was written``.

    Raises:
        FidelityError: they do; it has the ``report``.
    """
    notes = tuple(with_changes(note, fidelity) for note in report.notes)
    report = replace(report, fidelity=fidelity, notes=notes)
    if not fidelity.passed:
        reasons = "; ".join(fidelity.reasons)
        message = f"{report.source}: the converted model differs from the original: {reasons}; {undone}"
        raise with_report(FidelityError(message), replace(report, out=None))
    return report


def with_report(error: Failure, report: Report) -> Failure:
    """The error with the attribute ``report``: verdicts and figures for whoever catches it."""
    vars(error)["report"] = report
    return error
