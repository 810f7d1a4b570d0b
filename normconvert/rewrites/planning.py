"""Model on the meta device -> plan: trace it, ask the conversion, and compare the edited model with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from normconvert.analysis.norms import find_norms
from normconvert.analysis.streams import Analysis
from normconvert.option_fields import about
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites import crmsnorm, folding, fuse_bn, rmsnorm, rotating, scaling  # noqa: F401  # register themselves
from normconvert.rewrites.claims import unfounded
from normconvert.rewrites.comparison import prove
from normconvert.rewrites.edited_trace import Differs
from normconvert.rewrites.expected_changes import expected_changes
from normconvert.rewrites.registry import REWRITES
from normconvert.rewrites.ties import ties_for_good
from normconvert.rewrites.verdicts import ALLOWED, TAKEN_FOR_UNUSED, with_offers_that_help
from normconvert.sources.transformers_models import TIE
from normconvert.tracing.exits import unseen_exits
from normconvert.tracing.graph import Graph
from normconvert.tracing.model_graph import trace_model
from normconvert.wording.words import EXACT

MANY = 8
"""Doors that a note names."""


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
        TraceError: see :func:`normconvert.tracing.model_graph.trace_model`.
    """
    return planned(model, options or Options(), method, tracer)[0]


def planned(
    model: nn.Module, options: Options, method: str, tracer: Callable[[nn.Module], Graph] = trace_model
) -> tuple[Plan, Graph]:
    """As :func:`plan_model`; the graph as well, for :func:`difference`."""
    graph = tracer(model)
    return plan_graph(graph, options, method), graph


def plan_graph(graph: Graph, options: Options, method: str) -> Plan:
    """The plan for a model that has been traced."""
    planner = REWRITES[method].planner
    plan = planner(graph, options)
    shifted, unread = replace(options, allow_shifted_outputs=True), replace(options, allow_unread=True)
    for offer, taken in ((ALLOWED, shifted), (TAKEN_FOR_UNUSED, unread)):
        if any(verdict.reason.endswith(offer) for verdict in plan.verdicts):
            plan = with_offers_that_help(plan, planner(graph, taken), offer)
    if REWRITES[method].compared == "planning" and plan.converted and (found := difference(graph, plan, options)):
        verdicts = [_unproved(v, found) if v.converted else v for v in plan.verdicts]
        return Plan(method, verdicts=verdicts)
    # An option that a method does not know has no effect there.
    known = {name for name, _, option in about(Options) if method in option.methods and getattr(options, name)}
    if "keep_features" in known and plan.converted and (unseen := _unseen_exits(graph)):
        why = f"{unseen[0]} returns what is written to in place or within an object, which --keep-features keeps."
        kept = [replace(v, converted=False, code="features", reason=why) for v in plan.converted]
        return Plan(method, verdicts=[*plan.kept, *kept])
    return _with_doors(plan, graph, _taken_for_unused(plan, graph) if "allow_unread" in known else [])


def difference_later(graph: Graph, plan: Plan, options: Options) -> str:
    """As :func:`difference`, of a plan that nobody has compared while it was made: for the verification."""
    if plan.native:  # that model was compared; what is left is what the analysis says of tensors
        options = options.for_method(plan.method)
        return unfounded(graph, REWRITES[plan.method].planner(graph, options), options)
    return difference(graph, plan, options) if REWRITES[plan.method].compared == "verification" else ""


def difference(graph: Graph, plan: Plan, options: Options) -> str:
    """The first thing in which the edited model is not the old one, in words; empty if it is.

    Args:
        graph: of the original.
        plan: for it; or for another class of its family, under the names that it has here.
        options: that it was made with.
    """
    try:
        if why := unfounded(graph, plan, options):
            return why
        prove(graph, plan, expected_changes(graph, plan))
    except Differs as found:
        return str(found)
    return ""


def _taken_for_unused(plan: Plan, graph: Graph) -> list[str]:
    """What no traced call reads, and another might write into a stream that changes."""
    paths = {verdict.path for verdict in plan.converted}
    analysis = Analysis(graph, find_norms(graph, uncentred=True), mean_only=False)
    streams = [stream for stream in analysis.streams if any(norm.path in paths for norm, _ in stream.norms)]
    return list(dict.fromkeys(name for stream in streams for name in analysis.doubts(stream)))


def _unseen_exits(graph: Graph) -> list[str]:
    return unseen_exits(graph.modules[""], graph.unmarked, graph.nodes)


def _with_doors(plan: Plan, graph: Graph, unused: list[str]) -> Plan:
    """The plan with the ways into the model for which it is proved, and a note of those for which it is not.

    Args:
        plan: nothing is added if it converts nothing.
        graph: of the model.
        unused: tensors that the user has said are not used.
    """
    if not plan.converted:
        return plan
    untraced = [*plan.untraced_doors, *graph.untraced_doors, *_other_tables(plan, graph), *_unseen_exits(graph)]
    # Of the others the plan's own notes say what may come in by them.
    named = [door for door in untraced if door not in plan.untraced_doors]
    more = f" and {len(named) - MANY} more" if len(named) > MANY + 1 else ""
    notes = [f"not proved for {', '.join(named[:MANY] if more else named)}{more}"] if named else []
    if unused:
        rest = f" and {len(unused) - MANY} more" if len(unused) > MANY else ""
        names = ", ".join(unused[:MANY])
        notes.append(f"right as long as nothing uses {names}{rest}, which no traced call reads (--allow-unread)")
    if plan.shifted_doors:
        what = {"rmsnorm": "the stream without its mean", "crmsnorm": "the stream in fewer channels"}
        what |= {"rotate": "the stream in another basis", "fold": "what a norm gives, without its weight and bias"}
        what |= {"scale": "values times a power of two"}
        names = ", ".join(dict.fromkeys(row["door"] for row in plan.shifted_doors))
        notes.append(f"{EXACT}{what.get(plan.method, 'other values')}: {names}")
    doors = [door for door in graph.doors if door not in plan.untraced_doors]
    return replace(plan, notes=[*plan.notes, *notes], doors=doors, untraced_doors=untraced)


def _other_tables(plan: Plan, graph: Graph) -> list[str]:
    """``set_input_embeddings``, where the table itself is centred: another one would not be.

    ``resize_token_embeddings``, where the class then ties it to the head again, whatever the config says.
    """
    again = ["resize_token_embeddings"] if TIE in plan.config and ties_for_good(graph.modules[""]) else []
    try:
        weight = graph.modules[""].get_input_embeddings().weight  # type: ignore[operator]
    except Exception:  # a model without a table has many ways to say so
        return again
    names = {name for name, one in graph.modules[""].named_parameters(remove_duplicate=False) if one is weight}
    changed = {name for name in plan.tensors if names & {name, *plan.aliases.get(name, ())}}
    moved = any(edit["op"] in ("center", "rotate", "times") for name in changed for edit in plan.tensors[name])
    return ["set_input_embeddings", *again] if moved else again


def _unproved(verdict: Verdict, why: str) -> Verdict:
    reason = f"it could go {verdict.reason.rstrip('.')}, but the edited model is not the old one: {why}."
    return Verdict(verdict.path, verdict.kind, False, reason, "unproved")
