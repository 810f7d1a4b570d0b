"""The groups of rows by priority, the checks before them."""

from __future__ import annotations

from tools.benchmarks.gpu import checks, conversion, kernels, models, networks, swapped
from tools.benchmarks.gpu.tasks import Group, Task

GROUPS: dict[str, Group] = {
    checks.NAME: checks.GROUP,
    models.NAME: models.GROUP,
    swapped.NAME: swapped.GROUP,
    networks.NAME: networks.GROUP,
    kernels.NAME: kernels.GROUP,
    conversion.NAME: conversion.GROUP,
}


def set_up(task: Task) -> float:
    """Estimated seconds to build what the task needs."""
    return GROUPS[task.group].set_up(task.subject)
