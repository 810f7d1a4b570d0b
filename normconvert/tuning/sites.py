"""Which norms may be swapped, and what the stream analysis says of each: what it reads, and what it feeds."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import fx

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.verdicts import misuse
from normconvert.tracing.graph import Graph
from normconvert.tracing.operations import ATTENTION, SOFTMAX, name_of

ATTENDS = SOFTMAX | {ATTENTION, "aten._native_multi_head_attention"}
"""Operations that say: this branch is attention."""

ROLES = ("mlp", "attention", "final")
"""What a norm may feed, in the order in which norms are removed (arXiv 2507.02559)."""


@dataclass(frozen=True)
class NormSite:
    """A norm that may be swapped.

    Attributes:
        path: of its module.
        kind: its class.
        size: number of channels.
        eps: added to the variance.
        axis: of the channels in its input, negative.
        weight: name of its weight within the module; None: it has none.
        bias: likewise.
        offset: added to the weight.
        role: one of :data:`ROLES`.
        centred: it subtracts the mean over the channels (LayerNorm); False: RMSNorm.
        mean_free: nothing is lost where no mean is subtracted: what it reads can be, and is, centred, or it subtracts
            none itself.
    """

    path: str
    kind: str
    size: int
    eps: float
    axis: int
    weight: str | None
    bias: str | None
    offset: float
    role: str
    centred: bool
    mean_free: bool


def find_sites(graph: Graph, plan: Plan) -> list[NormSite]:
    """All norms of the graph, LayerNorms and RMSNorms, that are modules of their own, in execution order.

    Args:
        graph: the traced model.
        plan: of the ``rmsnorm`` rewrite for that graph: which LayerNorms read mean-free values.
    """
    norms = find_norms(graph, uncentred=True)
    converted = {v.path for v in plan.converted}
    sources = {norm.source for norm in norms}
    sites = []
    for path, group in by_path(norms).items():
        row = group[0].module
        if row is None or _obstacle(path, group, graph):
            continue
        roles = {_role(norm, sources) for norm in group}
        centred = any(norm.centred for norm in group)
        sites.append(
            NormSite(
                path=path,
                kind=group[0].kind,
                size=int(row["size"]),
                # torch's RMSNorm without an ε takes that of the dtype in which it computes: here, float32.
                eps=torch.finfo(torch.float32).eps if row["eps"] is None else float(row["eps"]),
                axis=int(row["axis"]),
                weight=row["weight"],
                bias=row["bias"],
                offset=float(row["offset"]),
                role=min(roles, key=("attention", "mlp", "final").index),
                centred=centred,
                mean_free=path in converted or not centred,
            )
        )
    return sites


def with_rms_norms(graph: Graph, plan: Plan) -> Plan:
    """A plan of the ``rmsnorm`` rewrite with a verdict for every RMSNorm, too, which that rewrite is not about.

    Args:
        graph: the traced model.
        plan: for that graph.
    """
    groups = {p: g for p, g in by_path(find_norms(graph, uncentred=True)).items() if not any(n.centred for n in g)}
    verdicts = [*plan.verdicts]
    for path, group in groups.items():
        reason = _obstacle(path, group, graph)
        code = "not-a-module" if reason else "kept"
        verdicts.append(Verdict(path, group[0].kind, False, reason or "it stays the RMSNorm that it was.", code))
    return replace(plan, verdicts=verdicts)


def casts_among(graph: Graph, gone: Collection[str]) -> bool:
    """Whether a norm at another path than ``gone`` casts its input to float32, whatever the model's dtype."""
    return any(norm.float32 and norm.path not in gone for norm in find_norms(graph, uncentred=True))


def _obstacle(path: str, group: list[Norm], graph: Graph) -> str:
    """Why a norm cannot be swapped, whatever it reads; empty if it can."""
    without = next((norm for norm in group if norm.module is None), None)
    if without is not None:
        return f"{without.obstacle}."
    found = misuse(path, group, graph)
    return found.reason if found is not None else ""


def _role(norm: Norm, sources: set[fx.Node]) -> str:
    """Whether attention, another branch or no further norm comes behind."""
    seen: set[fx.Node] = set()
    work = [norm.output]
    further = False
    while work:
        for user in work.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if name_of(user) in ATTENDS:
                return "attention"
            # Not past the next norm: what comes behind that is fed by it.
            if user in sources:
                further = True
            else:
                work.append(user)
    return "mlp" if further else "final"


def choose(sites: Sequence[NormSite], patterns: Sequence[str]) -> list[NormSite]:
    """The sites whose paths match one of the globs; all, if there are none.

    Raises:
        InputError: a glob matches nothing; the message lists the nearest paths.
    """
    if not patterns:
        return list(sites)
    paths = [site.path for site in sites]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise InputError(f"--norms {pattern!r} matches no norm; the nearest are {', '.join(near) or '(none)'}")
    return [site for site in sites if any(fnmatchcase(site.path, p) for p in patterns)]
