"""Memory for tensors in huge pages, where the system has them.

Fresh memory costs a fault for each of its pages, which takes longer than most arithmetic on what a page holds; a huge
page is 512 of them.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page


def memory(size: int) -> Tensor:
    """``size`` bytes; zeros, or anything."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    try:
        held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # torch says how much there was to be
        return torch.empty(size, dtype=torch.uint8)
    # Only advice: a kernel that cannot take it gives ordinary pages.
    with suppress(OSError):
        held.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive; it goes with the tensor.
    return torch.frombuffer(held, dtype=torch.uint8)


def in_float64(x: Tensor) -> Tensor:
    """A copy of a tensor of any shape and dtype in float64, on the same device."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return x.to(torch.float64, copy=True)
    return memory(math.prod(x.shape) * 8).view(torch.float64).reshape(x.shape).copy_(x)
