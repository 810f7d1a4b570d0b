"""Why a norm cannot be converted, whatever the conversion: verdicts that rewrites share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from normconvert.analysis.norms import Norm
from normconvert.analysis.streams import Analysis, AxisRef, Leak, Stream, operation
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.centring import leaks_of
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import boundary_of
from normconvert.tracing.operations import readers

ALLOWED = "; --allow-shifted-outputs lets that change."
"""How a reason ends that a user may lift."""
TAKEN_FOR_UNUSED = "; --allow-unread takes it for unused."
"""How one ends that doubt alone is, and another option."""
ALL_RETURNED = "; where all that is returned may change, nothing is left to be compared."
"""How it ends where the user has lifted it in vain."""


@dataclass(frozen=True)
class Obstacle:
    """The class of a reason, and the reason as a sentence; ``returned``: what returns the stream, if that is it."""

    code: str
    reason: str
    returned: str = ""


def obstacle(group: list[Norm], where: Mapping[Norm, tuple[Stream, AxisRef]], options: Options) -> Obstacle | None:
    """What keeps a norm (all calls of one module) from being converted: what it is, or what its streams are."""
    return obstacle_among(group, where, lambda stream: leaks_of(stream, options))


def obstacle_among(
    group: list[Norm], where: Mapping[Norm, tuple[Stream, AxisRef]], leaks: Callable[[Stream], list[Leak]]
) -> Obstacle | None:
    """The same, where a conversion has leaks of its own.

    Args:
        group: the calls.
        where: call -> the stream that it reads.
        leaks: what else reads a stream and may not, for the conversion in question.
    """
    for norm in group:
        if norm.module is None:
            return Obstacle("not-a-module", f"{norm.obstacle}.")
        if norm not in where:
            return Obstacle("unused", "nothing that the model returns depends on it.")
        stream = where[norm][0]
        if found := leaks(stream):
            return explain_leak(found, stream)
    return None


def misuse(path: str, group: list[Norm], graph: Graph) -> Obstacle | None:
    """Who uses a norm's module in another way than by calling the norm."""
    if reader := _reader_outside(path, group, graph):
        return Obstacle("not-a-module", f"{reader}, past the calls of the module.")
    if any(norm.module != group[0].module for norm in group):
        return Obstacle("not-a-module", "it is called in different ways.")
    return None


def with_nothing_compared(plan: Plan) -> Plan:
    """A plan that lets no output change, where all would have, and its reasons say so."""
    verdicts = [replace(verdict, reason=verdict.reason.replace(ALLOWED, ALL_RETURNED)) for verdict in plan.verdicts]
    return replace(plan, verdicts=verdicts)


def with_offers_that_help(plan: Plan, allowed: Plan, offer: str) -> Plan:
    """A plan whose reasons offer an option to norms that it has converted, and tell others all.

    Args:
        plan: without that option.
        allowed: with it.
        offer: how the reasons end that it may lift.
    """
    there = {verdict.path: verdict for verdict in allowed.verdicts}

    def told(verdict: Verdict) -> Verdict:
        other = there[verdict.path]
        if other.converted or not verdict.reason.endswith(offer):
            return verdict
        # What might be so is told only of norms that nothing else keeps.
        if other.reason.endswith(ALL_RETURNED) or (offer == TAKEN_FOR_UNUSED and "; --allow-" not in other.reason):
            return other
        first, option = verdict.reason.removesuffix(offer), offer.split()[1]
        return replace(other, reason=f"{first}; {option} alone does not help, for then {other.reason}")

    return replace(plan, verdicts=[told(verdict) for verdict in plan.verdicts])


def without_offers(plan: Plan) -> Plan:
    """A plan for a command that has none of the options which its reasons offer."""
    verdicts = [replace(v, reason=re.sub(r"; --allow-[^;]*$", ".", v.reason)) for v in plan.verdicts]
    return replace(plan, verdicts=verdicts)


def in_a_branch(obstacle: Obstacle, streams: Iterable[Stream], analysis: Analysis) -> Obstacle:
    """The same reason, named as that of a norm within a branch if no stream that it reads is a residual one.

    A residual stream has a value that is the sum of two others; what queries and keys are made of has none, or one of
    two products, where positions have turned them before.
    """
    for stream in streams:
        for made in stream.members.values():
            parts = [stream.members[ref].kind for ref in made.parts if made.kind == "sum" and ref[0] in analysis.data]
            if len(parts) > 1 and not set(parts) <= {"opaque", "scale"}:
                return obstacle
    return replace(obstacle, code="branch", reason=f"it reads no residual stream, and {obstacle.reason}")


def never_called(graph: Graph, called: set[str]) -> list[Verdict]:
    """Verdicts for the LayerNorms that no traced call runs."""
    found: dict[int, Verdict] = {}
    for path, module in graph.modules.items():
        if isinstance(module, nn.LayerNorm) and path not in called and id(module) not in found:
            found[id(module)] = Verdict(
                path, type(module).__name__, False, "no traced input makes the model run it.", "unreached"
            )
    # By identity, since a module that is registered twice is called by one of its names.
    seen = {id(graph.modules[path]) for path in called if path in graph.modules}
    return [verdict for key, verdict in found.items() if key not in seen]


def _reader_outside(path: str, group: list[Norm], graph: Graph) -> str:
    """Who uses the module or its parameters in another way than by calling the norm; empty if nobody does."""
    calls = [n for n in graph.nodes if boundary_of(n) == (path, "output", "")]
    # Each call of a module ends in a marker, so there is one for every norm in it, or it is not the norm alone.
    if len(calls) != len(group):
        return f"`{path}` does something else in {len(calls) - len(group)} of its calls"
    names = {f"{path}.{leaf}" for key in ("weight", "bias") if (leaf := (group[0].module or {}).get(key))}
    for node, parameter in graph.parameters.items():
        if names & set(parameter.aliases):
            outside = next((u for u in readers(node) if module_path(u) != path), None)
            if outside is not None:
                return f"{operation(outside)} uses `{parameter.name}`"
    return ""


def explain_leak(leaks: list[Leak], stream: Stream) -> Obstacle:
    """The most telling leak, in words."""
    # A returned stream is named only if nothing else leaks: that the user may allow.
    returned = [leak for leak in leaks if leak.code == "returned"]
    features = [leak for leak in leaks if leak.code == "features"]
    others = [leak for leak in leaks if leak.code not in ("returned", "features")]
    for leak in others:
        if leak.code == "linear" and _from_norm(leak.ref, stream):
            return Obstacle("post-norm", f"{operation(leak.reader)} reads the normalised stream directly (Post-LN).")
    if others:
        leak = others[0]
        maker = f"in `{module_path(leak.ref[0])}`" if module_path(leak.ref[0]) else "in the model"
        rest = len(others) - 1
        more = f" (and {rest} more reader{'s' if rest > 1 else ''})" if rest else ""
        end = TAKEN_FOR_UNUSED if leak.code == "unread" else "."
        return Obstacle(leak.code, f"the stream ({maker}) is not read by norms alone: {leak.reason}{more}{end}")
    if not returned:
        return Obstacle("features", f"{features[0].reason}, with its mean, which --keep-features keeps.")
    leak = returned[0]
    if _from_norm(leak.ref, stream):
        return Obstacle("post-norm", f"its stream is the normalised value itself, and {leak.reason} (Post-LN).")
    allowed = f"{leak.reason}, with its mean; --allow-shifted-outputs lets that mean change."
    return Obstacle("returned", allowed, leak.reason)


def _from_norm(ref: AxisRef, stream: Stream) -> bool:
    """Whether the value at ``ref`` is a norm's output, moved or cast."""
    made = stream.members.get(ref)
    while made is not None and made.kind == "sum" and len(made.parts) == 1:
        made = stream.members.get(made.parts[0])
    return made is not None and made.kind == "norm"
