"""Regions that export keeps as sub-graphs, autocast and no_grad, as a part of the graph around them."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from normconvert.errors import TraceError

_AUTOCAST = "wrap_with_autocast"
_REGIONS = ("wrap_with_set_grad_enabled", _AUTOCAST)


def inline_regions(module: fx.GraphModule) -> None:
    """Replace grad-mode regions, and those that switch autocast off, by their contents.

    Raises:
        TraceError: autocast is switched on, so that operations of the region cast their operands, which no graph shows.
    """
    # A region brings those within it to light, so this goes on until there are none.
    while regions := [n for n in module.graph.nodes if n.op == "call_function" and str(n.target) in _REGIONS]:
        for region in regions:
            # (device, dtype, enabled, ...): off is what it is outside, since no region that is on gets this far.
            if str(region.target) == _AUTOCAST and region.args[2]:
                raise TraceError(
                    f"the model could not be traced: it computes in "
                    f"{region.args[1]} by autocast on {region.args[0]}, and no graph shows what that casts"
                )
            position = next(i for i, a in enumerate(region.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            body = getattr(module, region.args[position].target)
            holders = [n for n in body.graph.nodes if n.op == "placeholder"]
            mapping: dict[fx.Node, Any] = dict(zip(holders, region.args[position + 1 :], strict=True))
            for name, sub in body.named_children():  # regions within regions
                fresh = f"{region.name}_{name}"
                setattr(module, fresh, sub)
                for node in body.graph.nodes:
                    if node.op == "get_attr" and node.target == name:
                        node.target = fresh
            with module.graph.inserting_before(region):
                results = module.graph.graph_copy(body.graph, mapping)
            results = results[0] if isinstance(results, tuple) and _wraps_twice(body) else results
            for user in list(region.users):
                if isinstance(results, (tuple, list)) and user.target is operator.getitem:
                    user.replace_all_uses_with(results[user.args[1]])
                    module.graph.erase_node(user)
            if region.users:
                region.replace_all_uses_with(results)
            module.graph.erase_node(region)


def _wraps_twice(body: fx.GraphModule) -> bool:
    """Whether a region's output node wraps its results in one more tuple."""
    value = next(n for n in body.graph.nodes if n.op == "output").args[0]
    return isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], (tuple, list))
