"""Building a model whose weights will come from a file: no random numbers are drawn for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

RANDOM_INIT = frozenset({"uniform_", "normal_", "trunc_normal_", "erfinv_", "bernoulli_", "exponential_"})


class NoRandomInit(TorchFunctionMode):
    """Skips random initialisation, which costs seconds and is overwritten by the checkpoint."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # By name: the functions of a tensor and those of torch.nn.init are different objects. The tensor itself is what
        # all of them return.
        if getattr(func, "__name__", "") in RANDOM_INIT and args and isinstance(args[0], torch.Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))
