"""One model of the sweep, from its name to its row: built small, traced, planned, and verified in float64."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

ATTEMPTS = 4
"""How many sizes of one model are tried: shrinking may have made a model that builds and does not run."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """One model with its plan, and what the row says so far.

    Attributes:
        case: the model.
        found: its facts.
        skeleton: it on the meta device.
        tracer: gives the graph of ``skeleton`` without tracing it again.
        plan: for the method.
    """

    case: Any
    found: Row
    skeleton: Any
    tracer: Any
    plan: Any


def sweep_one(library: str, name: str, arguments: argparse.Namespace) -> Row:
    """Build, trace, plan and verify one model; the row holds what each stage found."""
    from normconvert.options import Options
    from tools.census.zoo.fidelity import fidelity
    from tools.census.zoo.methods import METHODS, beside

    method = METHODS[arguments.method]
    options = Options(allow_shifted_outputs=arguments.allow_shifted_outputs)
    if arguments.min_gain is not None:
        options = replace(options, min_gain=arguments.min_gain)
    planned = _planned(library, name, arguments, options)
    if not isinstance(planned, Planned):
        return planned
    case, plan, skeleton = planned.case, planned.plan, planned.skeleton
    row = planned.found | _verdicts(plan, skeleton, method.is_norm)
    if arguments.stage == "plan":
        return row
    if plan.converted:
        row |= fidelity(case, plan)
    if method.again and row["left"]:
        again = replace(options, **method.again)
        row["again"] = _again(case, again, arguments.method, len(row["left"]), skeleton, planned.tracer)
    return row | (beside(case, method.beside) if method.beside is not None and asks_others(arguments) else {})


def _planned(library: str, name: str, arguments: argparse.Namespace, options: Any) -> Planned | Row:
    """The model as small as it can be traced, with its plan; or the row, where an earlier stage has the last word."""
    from normconvert.errors import TraceError
    from normconvert.rewrites.planning import plan_model
    from normconvert.tracing.model_graph import trace_model
    from tools.census.zoo.case import Skipped
    from tools.census.zoo.methods import METHODS
    from tools.census.zoo.timm_zoo import timm_case
    from tools.census.zoo.transformers_zoo import transformers_case

    make = transformers_case if library == "transformers" else timm_case
    row: Row = {}
    level = 0
    for _ in range(ATTEMPTS):
        try:
            case, level = make(name, level)
        except Skipped as error:
            return row if row else {"skipped": str(error)}
        found = _facts(case)
        if not found[METHODS[arguments.method].count] or arguments.stage == "build":
            return found
        skeleton = case.skeleton()
        try:
            graph = trace_model(skeleton)
            if arguments.stage == "trace":
                return found
            tracer = tracer_of(skeleton, graph)
            return Planned(case, found, skeleton, tracer, plan_model(skeleton, options, arguments.method, tracer))
        except TraceError as error:
            row = row or {**found, "failure": str(error).splitlines()[0][:300], "cause": "trace"}
            level += 1
        except Exception as error:
            return {**found, "failure": first_line(error), "cause": "plan"}
    return row


def tracer_of(skeleton: Any, graph: Any) -> Callable[[Any], Any]:
    """What gives the graph of a model that is traced already; other classes of its family are traced when asked for."""
    from normconvert.tracing.model_graph import trace_model

    return lambda model: graph if model is skeleton else trace_model(model)


def _facts(case: Any) -> Row:
    return {
        "model_class": case.model_class,
        "shrink": case.shrink,
        "parameters": case.parameters,
        "layernorms": case.layernorms,
        "batchnorms": case.batchnorms,
    }


def _again(case: Any, options: Any, name: str, left: int, skeleton: Any, tracer: Any) -> Row:
    """The same model with other options: what they take that was left."""
    from normconvert.rewrites.planning import plan_model
    from tools.census.zoo.fidelity import fidelity
    from tools.census.zoo.methods import METHODS

    try:
        plan = plan_model(skeleton, options, name, tracer)
    except Exception as error:
        return {"failure": first_line(error), "cause": "plan"}
    row = _verdicts(plan, skeleton, METHODS[name].is_norm)
    return row | (fidelity(case, plan) if len(row["left"]) < left else {})


def _verdicts(plan: Any, model: Any, is_norm: Any) -> Row:
    """Norms by verdict; one that the trace never met counts as a norm that stays.

    A verdict may be about a module that holds the norm, so norms are also listed by their own paths.
    """
    paths = [path for path, module in model.named_modules() if is_norm(module)]
    met = {verdict.path for verdict in plan.verdicts}
    unreached = [path for path in paths if not _is_within(path, met)]
    reasons: dict[str, int] = {"unreached": len(unreached)} if unreached else {}
    for verdict in plan.kept:
        reasons[verdict.code] = reasons.get(verdict.code, 0) + 1
    example = {"unreached": f"`{unreached[0]}`"} if unreached else {}
    example |= {v.code: f"`{v.path}`: {v.reason}" for v in reversed(plan.kept)}
    taken = {verdict.path for verdict in plan.converted}
    return {
        "norms": len(plan.verdicts) + len(unreached),
        "converted": len(plan.converted),
        "without_verdict": len(unreached),
        "taken": [path for path in paths if _is_within(path, taken)],
        "left": [path for path in paths if not _is_within(path, taken)],
        "reasons": reasons,
        "examples": example,
        "centrings": sum(edit["op"] == "center" for edit in plan.modules),
        "float32_norms": plan.float32_norms,
    }


def _is_within(path: str, owners: set[str]) -> bool:
    """Whether a module is one of ``owners`` or inside one."""
    parts = path.split(".")
    return any(".".join(parts[:n]) in owners for n in range(1, len(parts) + 1))


def asks_others(arguments: argparse.Namespace) -> bool:
    """Whether other tools convert the model as well, for comparison."""
    from tools.census.zoo.methods import METHODS

    return METHODS[arguments.method].beside is not None and arguments.stage == "verify" and not arguments.ours


def first_line(error: BaseException) -> str:
    """The exception's class and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
