"""The conversions as the coverage sweep sees them: which norms they are about, and what else it asks of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tools.fusers import TOOLS, fused_by
from tools.zoo.case import Case, is_batchnorm, is_layernorm

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
    """What other tools fuse in the same model (see `tools.fusers`), and its configuration, to build it elsewhere."""
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
