"""Hooks that a model's owner put on its modules: what they are given leaves the model, for all a trace can tell."""

from __future__ import annotations

from torch import fx, nn

from normconvert.tracing.in_place_writes import boundary_of

WATCHED = "watched"
"""The side of a marker at what a module's own hooks are given; no operation can stand there."""
KNOWN = ("torch.nn.utils.", "normconvert.")
"""Hooks of these modules keep nothing of what they are given: torch's make a weight of others (weight_norm, prune)."""


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, other than torch's own for weights and those of this package."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(not _module_of(hook).startswith(KNOWN) for hook in hooks)


def _module_of(hook: object) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def watched_values(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Value that a hook is given -> a name for it, as an output has one; these values become outputs of ``graph``."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        place = boundary_of(node)
        if place is not None and place[1] == WATCHED:
            found[node] = (f"what a hook of {place[0]} is given",)
    if found:
        output = next(node for node in graph.nodes if node.op == "output")
        values = output.args[0]
        assert isinstance(values, (tuple, list))
        output.args = ((*values, *found),)
    return found
