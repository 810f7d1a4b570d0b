"""What this machine has to give: cores and memory, within the limits of a container."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

KEPT_FREE = 0.1
"""Share of the memory that is free now which a batch leaves alone."""
_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use."""
    # What this process may use: a container or a scheduler often gives fewer than the machine has.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max 100000" without a limit
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def memory() -> int:
    """Bytes that may be used now without swapping."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        # The kernel ends what goes beyond this, however much memory the machine has left.
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    return int(max(free, 0) * (1 - KEPT_FREE))
