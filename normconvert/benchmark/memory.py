"""How much memory a call takes at its peak, beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from normconvert.compat.torch import TorchDispatchMode, pytree


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The largest number of bytes allocated at once during ``call``; None where the device does not tell.

    On the CPU the results of operations are followed, one by one; what a kernel takes for itself is not seen, nor what
    compiled code does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with _Allocations() as seen:
        call()
    return seen.peak


class _Allocations(TorchDispatchMode):
    """Follows the memory behind the results of operations, from when it is made until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        held = {
            StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in held:  # no view of what was there, nor written in place
                    self.live[storage] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result
