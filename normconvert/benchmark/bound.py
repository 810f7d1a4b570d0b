"""The bound: a model without the norms that a conversion touches. Nothing that only touches norms can be faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.runtime import MODULE_EDITS
from normconvert.runtime.modules import stand_in

Layouts = dict[int, tuple[tuple[int, ...], torch.dtype]]
"""Number of dimensions of a result -> its dimensions from the outermost in memory to the innermost, and its dtype."""


class Removed(nn.Module):
    """What stands where a norm was: it returns its input, in the memory layout and dtype that the norm's result had.

    Keeping the layout matters, since what follows may be faster or slower on another one, or cannot be done on it at
    all (``view``). It is a copy only where the norm made one, too.

    Args:
        seen: how the norm's results lay in memory.
    """

    def __init__(self, seen: Layouts) -> None:
        super().__init__()
        self.seen = dict(seen)

    def forward(self, input: Tensor, *rest: Any, **options: Any) -> Tensor:
        """The input."""
        order, dtype = self.seen.get(input.ndim, (None, input.dtype))
        if order is not None:
            back = tuple(order.index(d) for d in range(len(order)))
            input = input.permute(order).contiguous().permute(back)
        return input.to(dtype)


def without_norms(
    model: nn.Module, norms: Iterable[str], edits: Iterable[Mapping[str, Any]], call: Callable[[nn.Module], object]
) -> nn.Module:
    """A copy of ``model`` without ``norms``; it shares all other parameters with the model.

    Args:
        model: the original, in eval mode; unchanged.
        norms: module paths of the norms that a conversion changes.
        edits: the module edits of that conversion. Of a norm that applies more than itself (an activation, say) they
            say which children stay.
        call: runs a model once, to see what memory layout each norm gives its result.

    Raises:
        InputError: a path names no module of this model.
    """
    shared = [*model.parameters(), *model.buffers()]
    # Sharing the weights: a large model and its bound must fit beside each other.
    bound = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    seen = _layouts(model, norms, call)
    absorbed = {edit["path"]: edit for edit in edits if edit["op"] in ("absorb", "clip")}
    for path, layouts in seen.items():
        # A norm that is applied with its activation leaves that behind: the bound lacks norms and nothing else.
        if path in absorbed:
            MODULE_EDITS["absorb"](bound, absorbed[path])
        else:
            stand_in(bound, bound.get_submodule(path), Removed(layouts))
    return bound.eval()


def _layouts(model: nn.Module, norms: Iterable[str], call: Callable[[nn.Module], object]) -> dict[str, Layouts]:
    """Of each norm what it returned in one call of the model, as `Removed` takes it; empty for one that did not run."""
    found: dict[str, Layouts] = {}
    handles = []
    for path in norms:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise InputError(f"{type(model).__name__} has no module {path!r}: is it another model's?") from None
        layouts: Layouts = found.setdefault(path, {})

        def note(module: nn.Module, args: Any, output: Any, into: Layouts = layouts) -> None:
            if isinstance(output, Tensor):
                strides = output.stride()
                # Dimensions of one element tie with others; in their natural order they cost no copy.
                order = sorted(range(output.ndim), key=lambda d: (-strides[d], d))
                into[output.ndim] = tuple(order), output.dtype

        handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
