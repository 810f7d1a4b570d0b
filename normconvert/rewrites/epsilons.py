"""A norm's eps: the number in its graph, the attributes of its module that it comes from, and keys of the config.

What a class does with an attribute is not assumed: the edited model is traced, and the number in its graph must be the
new one and every other the old (`comparison`). Of a config the same is asked of modules: the model built from the
changed one must have the numbers that the edits give, and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from normconvert.analysis.norms import Norm
from normconvert.compat.transformers import builder
from normconvert.plan.conversion_plan import set_in_config
from normconvert.rewrites.verdicts import Obstacle
from normconvert.tracing.graph import Graph
from normconvert.tracing.probes import quiet

Edit = dict[str, Any]


def epsilon_node(norm: Norm) -> fx.Node | None:
    """The one node of a norm that holds its eps; None if there is none, or there are several."""
    eps = (norm.module or {}).get("eps")
    found = [node for node in norm.inside if any(_is(value, eps) for value in (*node.args, *node.kwargs.values()))]
    return found[0] if len(found) == 1 else None


def _is(value: Any, eps: Any) -> bool:
    return type(value) is float and value == eps


def attributes_of(graph: Graph, group: list[Norm]) -> list[str] | Obstacle | None:
    """The attributes of a norm's module that hold its eps, an empty list where that is zero; None if none holds it.

    Args:
        graph: the model.
        group: all calls of the norm, which has a module.
    """
    eps = (group[0].module or {}).get("eps")
    if eps is None:
        return Obstacle("epsilon", "it has no ε of its own, but that of the dtype it runs in.")
    if eps == 0:
        return []
    module = graph.modules[group[0].path]
    names = attributes_with(module, eps)
    return names if names and all(map(epsilon_node, group)) else None


def attributes_with(module: nn.Module, eps: float) -> list[str]:
    """The attributes of a module that are that number."""
    return [name for name, value in vars(module).items() if _is(value, eps) and not name.startswith("_")]


def epsilon_edit(norm: Norm, attributes: list[str] | None, eps: float) -> Edit:
    """The module edit that gives a norm another eps: an attribute's number, or a norm of ours in place of its class.

    Args:
        norm: has a module.
        attributes: of :func:`attributes_of`.
        eps: the new one.
    """
    if attributes is not None:
        return {"op": "epsilon", "path": norm.path, "attributes": attributes, "eps": eps}
    kind = "layernorm" if norm.centred else "rmsnorm"
    return {**(norm.module or {}), "op": "renew", "kind": kind, "eps": eps}


def epsilons_in_config(model: nn.Module, rows: Sequence[Edit]) -> dict[str, float]:
    """The changes of a model's config that give norms their new eps; the rows of those norms are marked ``stated``.

    Args:
        model: on the meta device.
        rows: module edits ``epsilon``.

    Returns:
        Dotted key -> value. A key that other norms go by is none of them.
    """
    config = getattr(model, "config", None)
    if not rows or not hasattr(model, "main_input_name") or not hasattr(config, "to_dict"):
        return {}
    wanted = {row["path"]: dict.fromkeys(row["attributes"], row["eps"]) for row in rows}
    before = _numbers(model)
    old = {before[path][name] for path, names in wanted.items() for name in names if path in before}
    found: dict[str, float] = {}
    for key, value in _keys(config):
        for eps in {row["eps"] for row in rows} if value in old else ():
            changed = _changes(model, key, eps, before)
            if changed and all(wanted.get(path) == numbers for path, numbers in changed.items()):
                found[key] = eps
                for row in rows:
                    row["stated"] = row.get("stated", False) or row["path"] in changed
    return found


def _keys(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The floating numbers of a config and of the configs in it."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is float:
            yield prefix + name, value
        elif hasattr(value, "to_dict"):
            yield from _keys(value, f"{prefix}{name}.")


def _numbers(model: nn.Module) -> dict[str, dict[str, float]]:
    return {
        path: {name: value for name, value in vars(module).items() if type(value) is float}
        for path, module in model.named_modules()
    }


def _changes(model: Any, key: str, value: float, before: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Path of a module -> the numbers that it has where ``key`` of the config is ``value``, and had not before."""
    config = copy.deepcopy(model.config)
    set_in_config(config, key, value)
    try:
        with quiet(), torch.device("meta"):
            other = builder(type(model))(config, dtype=model.dtype)
    except Exception:  # a value that the class refuses, or a class that only from_pretrained can build
        return {}
    after = _numbers(other)
    if after.keys() != before.keys():
        return {}
    found = {path: {n: v for n, v in numbers.items() if before[path].get(n) != v} for path, numbers in after.items()}
    return {path: numbers for path, numbers in found.items() if numbers}
