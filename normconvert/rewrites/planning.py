"""Model on the meta device -> plan: trace it, ask the conversion, and prove what the analysis alone cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites import crmsnorm, fuse_bn, rmsnorm  # noqa: F401  # they register themselves
from normconvert.rewrites.registry import REWRITES
from normconvert.runtime import apply_module_edits
from normconvert.tracing.graph import Graph
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.model_graph import trace_model


def plan_model(
    model: nn.Module,
    options: Options | None = None,
    method: str = "rmsnorm",
    tracer: Callable[[nn.Module], Graph] = trace_model,
) -> Plan:
    """The plan that converts the norms of ``model`` (on the meta device).

    Args:
        model: its weights are not read.
        options: what the user allows.
        method: one of :data:`normconvert.rewrites.registry.REWRITES`.
        tracer: how a model becomes a graph; by default with probe inputs that it accepts.

    Raises:
        TraceError: see :func:`normconvert.tracing.graph.model_graph.trace_model`.
    """
    graph = tracer(model)
    rewrite = REWRITES[method]
    plan = rewrite.planner(graph, options or Options())
    if rewrite.proof is not None and plan.converted:
        edited = copy_model(model)
        try:
            apply_module_edits(edited, plan.modules)
            found = rewrite.proof(graph, tracer(edited), plan)
        # A model that the edits do not fit, or that runs no more, is not proved either: the plan changes nothing then.
        except (TraceError, ValueError) as error:
            found = str(error)
        if found:
            verdicts = [_unproved(v, found) if v.converted else v for v in plan.verdicts]
            return Plan(method, verdicts=verdicts)
    return _with_doors(plan, graph)


def _with_doors(plan: Plan, graph: Graph) -> Plan:
    """The plan with the ways into the model for which it is proved, and a note of those for which it is not."""
    if not plan.converted:
        return plan
    untraced = [*graph.untraced_doors, *_new_table(plan, graph)]
    notes = [f"not proved for {', '.join(untraced)}"] if untraced else []
    if plan.shifted_doors:
        what = {"rmsnorm": "the stream without its mean", "crmsnorm": "the stream in fewer channels"}
        names = ", ".join(dict.fromkeys(row["door"] for row in plan.shifted_doors))
        notes.append(f"forward() is exact; these return {what.get(plan.method, 'other values')}: {names}")
    return replace(plan, notes=[*plan.notes, *notes], doors=list(graph.doors), untraced_doors=untraced)


def _new_table(plan: Plan, graph: Graph) -> list[str]:
    """``set_input_embeddings``, where the table itself is centred: another one would not be."""
    try:
        weight = graph.modules[""].get_input_embeddings().weight  # type: ignore[operator]
    except Exception:  # a model without a table has many ways to say so
        return []
    names = {name for name, one in graph.modules[""].named_parameters(remove_duplicate=False) if one is weight}
    changed = {name for name in plan.tensors if names & {name, *plan.aliases.get(name, ())}}
    return ["set_input_embeddings"] if any(e["op"] == "center" for n in changed for e in plan.tensors[n]) else []


def _unproved(verdict: Verdict, why: str) -> Verdict:
    reason = f"it could go {verdict.reason.rstrip('.')}, but the edited model is not the old one: {why}."
    return Verdict(verdict.path, verdict.kind, False, reason, "unproved")
