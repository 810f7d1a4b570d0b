"""What a swap works on: a source, the plan that centres its streams, and the norms that are to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from normconvert.analysis.attentions import Attention, find_attentions
from normconvert.analysis.norms import find_norms
from normconvert.errors import InputError, NothingToConvert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.sources import Source
from normconvert.tracing.graph import Graph
from normconvert.tuning.attention import choose_attentions
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
        attentions: the attention to make linear.
        left: path of a module whose attention stays -> why.
        wanted: the inputs that the model takes.
    """

    source: Source
    plan: Plan
    sites: tuple[NormSite, ...]
    norms: int
    wanted: Wanted
    attentions: tuple[Attention, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


def analyse(source: Source, settings: Settings, fuse: bool, clock: Callable[[str], None]) -> Subject:
    """What the norms and the attention of a source read and feed, and which are to be swapped.

    Raises:
        NothingToConvert: none can be.
    """
    clock("trace")
    from normconvert.tracing.model_graph import trace_model

    if source.modules:
        raise InputError(f"{source.reference}: its norms have been changed already; swap those of the original")
    model = source.skeleton()
    graph = trace_model(model)
    if settings.linear:
        attentions, left = choose_attentions(find_attentions(graph), settings.attention)
        if not attentions:
            raise NothingToConvert(f"{source.reference}: no attention can be swapped: {_reasons(left)}")
    else:
        attentions, left = (), {}
    plan, chosen = _norms(source, graph, settings, fuse) if settings.norm_method else (_norms_kept(graph), ())
    wanted = wanted_by(source, source.skeleton())
    return Subject(source, plan, chosen, len(plan.verdicts), wanted, attentions, left)


def _reasons(left: Mapping[str, str]) -> str:
    """Each reason once, with the first path that it holds for."""
    first = {reason: path for path, reason in reversed(list(left.items()))}
    return " ".join(f"`{first[reason]}`: {reason}" for reason in dict.fromkeys(left.values())) or "it has none"


def _norms_kept(graph: Graph) -> Plan:
    """A plan that leaves all norms as they are."""
    norms = {norm.path: norm for norm in find_norms(graph, uncentred=True)}
    verdicts = [Verdict(path, norm.kind, False, "only attention is swapped.", "kept") for path, norm in norms.items()]
    return Plan("swap sla", verdicts=verdicts, float32_norms=casts_among(graph, ()))


def _norms(source: Source, graph: Graph, settings: Settings, fuse: bool) -> tuple[Plan, tuple[NormSite, ...]]:
    """The plan that centres what the norms read, and the norms to swap."""
    # an embedding that is the head, too, cannot hold what the last norm leaves behind
    plan = _centred(graph, tied="untie" if fuse else "center")
    sites = find_sites(graph, plan)
    if not sites:
        reasons = "; ".join(dict.fromkeys(v.reason for v in plan.verdicts)) or "it has no LayerNorm and no RMSNorm"
        raise NothingToConvert(f"{source.reference}: no norm can be swapped: {reasons}")
    chosen = tuple(choose(sites, settings.norms))
    # The last norm stays, so nothing moves into the head, and two tables would be one too many.
    if fuse and not any(site.role == "final" for site in chosen):
        plan = _centred(graph, tied="center")
    elif fuse:
        plan = _with_untied_heads(graph, plan)
    # What is compared in float64 casts to float32 where a norm that stays does; the others are gone, or are this
    # package's, which do not.
    gone = {site.path for site in chosen} | {v.path for v in plan.converted}
    plan = replace(plan, float32_norms=casts_among(graph, gone))
    return plan, chosen


def _centred(graph: Graph, tied: str) -> Plan:
    from normconvert.rewrites.rmsnorm import plan_rmsnorm
    from normconvert.rewrites.verdicts import without_offers

    return with_rms_norms(graph, without_offers(plan_rmsnorm(graph, Options(tied=tied))))


def _with_untied_heads(graph: Graph, plan: Plan) -> Plan:
    """A plan whose tied tables are two tensors, since the head is to change and the embedding is not."""
    from normconvert.analysis.streams import Analysis
    from normconvert.rewrites.moved_norms import tables_to_untie
    from normconvert.rewrites.untying import untie_head

    tensors, config = dict(plan.tensors), dict(plan.config)
    for own, head in tables_to_untie(Analysis(graph, find_norms(graph, uncentred=True))).values():
        if head not in tensors and own not in tensors:
            untie_head(graph, own, head, tensors, config)
    return replace(plan, tensors=tensors, config=config)
