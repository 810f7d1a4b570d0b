"""What a swap works on: a source, the plan that centres its streams, and the norms that are to go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from normconvert.errors import InputError, NothingToConvert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import Source
from normconvert.tracing.graph import Graph
from normconvert.tuning.data import Wanted, wanted_by
from normconvert.tuning.settings import Settings
from normconvert.tuning.sites import NormSite, casts_among, choose, find_sites, with_rms_norms


@dataclass(frozen=True)
class Subject:
    """What is to be swapped: the analysed source.

    Attributes:
        source: the original.
        plan: of the ``rmsnorm`` rewrite, with a verdict for each RMSNorm, too.
        sites: the norms to swap.
        norms: how many the model has.
        wanted: the inputs that the model takes.
    """

    source: Source
    plan: Plan
    sites: tuple[NormSite, ...]
    norms: int
    wanted: Wanted


def analyse(source: Source, settings: Settings, fuse: bool, clock: Callable[[str], None]) -> Subject:
    """What the norms of a source read and feed, and which are to be swapped.

    Raises:
        NothingToConvert: none can be.
    """
    clock("trace")
    from normconvert.rewrites.rmsnorm import plan_rmsnorm
    from normconvert.tracing.model_graph import trace_model

    if source.modules:
        raise InputError(f"{source.reference}: its norms have been changed already; swap those of the original")
    model = source.skeleton()
    graph = trace_model(model)
    # an embedding that is the head, too, cannot hold what the last norm leaves behind
    plan = with_rms_norms(graph, plan_rmsnorm(graph, Options(tied="untie" if fuse else "center")))
    sites = find_sites(graph, plan)
    if not sites:
        reasons = "; ".join(dict.fromkeys(v.reason for v in plan.verdicts)) or "it has no LayerNorm and no RMSNorm"
        raise NothingToConvert(f"{source.reference}: no norm can be swapped: {reasons}")
    chosen = tuple(choose(sites, settings.norms))
    # The last norm stays, so nothing moves into the head, and two tables would be one too many.
    if fuse and not any(site.role == "final" for site in chosen):
        plan = with_rms_norms(graph, plan_rmsnorm(graph, Options(tied="center")))
    elif fuse:
        plan = _with_untied_heads(graph, plan)
    # What is compared in float64 casts to float32 where a norm that stays does; the others are gone, or are this
    # package's, which do not.
    gone = {site.path for site in chosen} | {v.path for v in plan.converted}
    plan = replace(plan, float32_norms=casts_among(graph, gone))
    return Subject(source, plan, chosen, len(plan.verdicts), wanted_by(source, source.skeleton()))


def _with_untied_heads(graph: Graph, plan: Plan) -> Plan:
    """A plan whose tied tables are two tensors, since the head is to change and the embedding is not."""
    from normconvert.analysis.norms import find_norms
    from normconvert.analysis.streams import Analysis
    from normconvert.rewrites.moved_norms import tables_to_untie

    tensors, config = dict(plan.tensors), dict(plan.config)
    for own, head in tables_to_untie(Analysis(graph, find_norms(graph, uncentred=True))).values():
        if head not in tensors and own not in tensors:
            tensors[head] = [{"op": "copy", "from": own}]
            config["tie_word_embeddings"] = False
    return replace(plan, tensors=tensors, config=config)
