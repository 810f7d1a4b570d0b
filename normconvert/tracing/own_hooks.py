"""Hooks that a model's owner put on its modules: what they are given leaves the model, for all a trace can tell."""

from __future__ import annotations

from collections.abc import Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from normconvert.compat.torch import pytree
from normconvert.errors import TraceError
from normconvert.tracing.in_place_writes import boundary_marker, boundary_of

WATCHED = "watched"
"""The side of a marker at what a module's own hooks are given; no operation can stand there."""
KNOWN = ("torch.nn.utils.", "transformers.utils.output_capturing", "normconvert.")
"""Hooks of these modules keep nothing of what they are given that a trace does not see: torch's make a weight of others
(weight_norm, prune), and those of transformers, which stay once a call has asked for hidden states, hand them to the
call that asks, whose outputs they are."""
KNOWN_NAMES = ("make_inputs_require_grad", "make_inputs_require_grads")
"""Of transformers and peft, for gradient checkpointing: they have embeddings require gradients, and keep nothing."""


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks other than those that are known to keep nothing."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(map(_is_known, hooks))


def _is_known(hook: object) -> bool:
    module = str(getattr(hook, "__module__", None) or type(hook).__module__)
    if module.startswith(("transformers.", "peft.")) and getattr(hook, "__name__", "") in KNOWN_NAMES:
        return True
    return module.startswith(KNOWN)


def mark_watched(path: str, module: nn.Module, stack: ExitStack) -> None:
    """Mark all that the module's own hooks are given, and what they make of it; ``stack`` takes the marks away."""

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # One number may be a constant, whose value torch computes while it traces.
            seen = leaf.is_floating_point() and leaf.numel() > 1
            return boundary_marker(leaf, path, WATCHED, "") if seen else leaf
        if leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return leaf
        raise TypeError(f"a hook of {path} is given a {type(leaf).__name__}, which may hold anything: remove the hook")

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map(mark, args), pytree.tree_map(mark, kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map(mark, output)

    for first in (True, False):
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=first).remove)
        stack.callback(module.register_forward_hook(after, prepend=first).remove)


def refuse_unseen(model: nn.Module, unmarked: Set[str]) -> None:
    """Refuse hooks of modules that have no marks, since what they are given is written to in place.

    Raises:
        TraceError: there is one.
    """
    for path in sorted(unmarked):
        if has_own_hooks(model.get_submodule(path)):
            raise TraceError(f"a hook of {path} is given what is written to in place later: remove the hook")


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
