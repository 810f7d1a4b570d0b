"""Which norms may be swapped, and what the stream analysis says of each: what it reads, and what it feeds."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from normconvert.analysis.norms import Norm, find_norms
from normconvert.analysis.operations import name_of
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import MARKER

ATTENTION = ("attention", "softmax")
"""How the names of operations begin or end that say: this branch is attention."""

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
        mean_free: what it reads can be, and is, centred.
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
    mean_free: bool


def find_sites(graph: Graph, plan: Plan) -> list[NormSite]:
    """All norms of the graph that are modules of their own, in execution order.

    Args:
        graph: the traced model.
        plan: of the ``rmsnorm`` rewrite for that graph: which norms read mean-free values.
    """
    calls: dict[str, list[Norm]] = defaultdict(list)
    norms = find_norms(graph)
    for norm in norms:
        calls[norm.path].append(norm)
    converted = {v.path for v in plan.converted}
    sources = {norm.source for norm in norms}
    sites = []
    for path, group in calls.items():
        row = group[0].module
        if row is None or any(norm.module != row for norm in group):
            continue
        roles = {_role(norm, sources) for norm in group}
        sites.append(
            NormSite(
                path=path,
                kind=group[0].kind,
                size=int(row["size"]),
                eps=float(row["eps"]),
                axis=int(row["axis"]),
                weight=row["weight"],
                bias=row["bias"],
                offset=float(row["offset"]),
                role=min(roles, key=("attention", "mlp", "final").index),
                mean_free=path in converted,
            )
        )
    return sites


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
            name = name_of(user)
            if user.target is not MARKER and any(word in name for word in ATTENTION):
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
