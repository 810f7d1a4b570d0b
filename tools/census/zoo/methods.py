"""The conversions as the coverage sweep sees them: which norms they are about, and what else it asks of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tools.census.fusers import TOOLS, fused_by
from tools.census.zoo.case import Case, is_batchnorm, is_layernorm

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One conversion.

    Attributes:
        norm: the norm it takes away, whose table of timm's variants is swept: ``LayerNorm`` or ``BatchNorm``.
        count: the field of a case, and of its row, that holds how many of them a model has.
        is_norm: whether a module is one.
        work: name of the work file.
        again: options that may take norms which are left; the model is converted with them as well, then.
        beside: further columns of the model's row, from the case and a probe's inputs; None if there are none.
        column_of: the method whose table shows the result as a column; only what that one converts is tried.
    """

    norm: str
    count: str
    is_norm: Callable[[nn.Module], bool]
    work: str
    again: Mapping[str, Any] = field(default_factory=dict)
    beside: Callable[[Case, Mapping[str, Any]], Row] | None = None
    column_of: str | None = None


def other_fusers(case: Case, inputs: Mapping[str, Any]) -> Row:
    """What other tools fuse in the same model (see `tools.census.fusers`), and its configuration, to build it again."""
    config = getattr(case.skeleton(), "config", None)
    described = {"config": json.loads(config.to_json_string(use_diff=False))} if config is not None else {}
    return {**described, "others": {tool: fused_by(tool, case.build(), inputs) for tool in TOOLS}}


METHODS: Mapping[str, Method] = {
    "rmsnorm": Method("LayerNorm", "layernorms", is_layernorm, "coverage.jsonl"),
    "crmsnorm": Method("LayerNorm", "layernorms", is_layernorm, "coverage-crmsnorm.jsonl", column_of="rmsnorm"),
    "fuse-bn": Method(
        "BatchNorm", "batchnorms", is_batchnorm, "coverage-fuse-bn.jsonl", {"merge_branches": True}, other_fusers
    ),
}


def warm_up(method: str) -> None:
    """Do once, on next to nothing, what every child does: what is imported on the way is then there for all of them."""
    from normconvert.rewrites.planning import plan_model
    from normconvert.tracing.graph import trace
    from tools.census.zoo.transformers_zoo import transformers_case

    x = torch.ones(2, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    plan_model(network.to("meta"), method=method, tracer=lambda model: trace(model, {"input": x.to("meta")}))
    transformers_case("gpt2")[0].build()
    if METHODS[method].beside is not None:
        for tool in TOOLS:
            fused_by(tool, network.to_empty(device="cpu"), {"input": x})


def beside(case: Any, columns: Any) -> Row:
    """Further columns, from the first of the probes."""
    from normconvert.tracing.probes import verification_inputs

    inputs = verification_inputs(case.skeleton(), seed=0)[0].inputs
    return {"inputs": list(inputs), **columns(case, inputs)}


def with_others(library: str, name: str, known: Row, method: str) -> Row:
    """A row of an earlier run, and the columns about other tools, on the model built as it was then."""
    from tools.census.zoo.timm_zoo import timm_case
    from tools.census.zoo.transformers_zoo import transformers_case

    make = transformers_case if library == "transformers" else timm_case
    columns, level = METHODS[method].beside, -1
    assert columns is not None
    while True:
        case, level = make(name, level + 1)
        if case.shrink == known["shrink"]:
            return {**known, **beside(case, columns)}
