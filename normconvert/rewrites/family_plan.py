"""Source x plan -> the plan with what it means for the other classes of the model's family."""

from __future__ import annotations

from dataclasses import replace

from normconvert.errors import NormConvertError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.families import obstacle_in
from normconvert.rewrites.native import native_obstacle
from normconvert.sources.families import as_class, opened_otherwise, tied_to
from normconvert.sources.native_models import natives
from normconvert.sources.source import Source
from normconvert.sources.transformers_models import own_class
from normconvert.tracing.graph import Graph

SHIFTED_CLASS = "not proved if opened as "
FAMILY = 2
"""So many other classes of a family are traced: each takes as long as the model itself."""


def with_family(
    source: Source, plan: Plan, options: Options, *, compare: bool = True, whole: Graph | None = None
) -> Plan:
    """The plan with the classes of the family for which it is proved too, those where it is not, and notes of these.

    Args:
        source: of the original.
        plan: for it.
        options: that it was made with.
        compare: see :func:`normconvert.rewrites.families.obstacle_in`.
        whole: see there.
    """
    # Of other shapes no class but the converted one can be made at all.
    resized = any(edit["op"] == "resize" for edit in plan.modules)
    if source.library != "transformers" or source.modules or resized or own_class(source) is not None:
        return plan
    if plan.native:
        return _with_native_family(source, plan, options)
    tied = tied_to(source, set(plan.tensors))
    refused = {name: f"it ties another tensor to `{table}`" for name, table in tied.items()}
    proved = []
    for name in opened_otherwise(source)[:FAMILY]:
        try:
            why = obstacle_in(as_class(source, name).skeleton(), plan, options, compare=compare, whole=whole)
        except NormConvertError as error:
            why = str(error)
        if why:
            refused[name] = why
        else:
            proved.append(name)
    return _told(plan, proved, refused)


def _with_native_family(source: Source, plan: Plan, options: Options) -> Plan:
    """The same for the library's own RMSNorm model, each class of whose family is proved by itself."""
    proved, refused = [], {}
    for name in opened_otherwise(source)[:FAMILY]:
        other = as_class(source, name)
        for native in natives(other, 0.0):
            try:
                why = native_obstacle(other, plan, options.for_method(plan.method))
            except NormConvertError as error:
                why = str(error)
            if why:
                refused[native.architecture] = why
            else:
                proved.append(native.architecture)
    return _told(plan, proved, refused)


def _told(plan: Plan, proved: list[str], refused: dict[str, str]) -> Plan:
    notes = [f"{SHIFTED_CLASS}{name} ({why}): convert the original as that" for name, why in refused.items()]
    return replace(plan, classes=proved, shifted_classes=refused, notes=[*plan.notes, *notes])
