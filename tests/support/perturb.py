"""Random weights that hide nothing: default initialisation (weights 1, biases 0) makes most mistakes invisible."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def _is_norm(module: nn.Module) -> bool:
    """A module that holds a vector named ``weight`` and is named after a norm, or has running statistics."""
    name = type(module).__name__.lower()
    return "norm" in name or "batchnorm" in name or "running_var" in dict(module.named_buffers(recurse=False))


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, tensor)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensor.is_floating_point() and not tensor.is_meta
    ]


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise every parameter and running statistic in place, the same for the same seed.

    Norm weights become 1 + 0.3 n, all biases 0.3 n, other vectors (layer scales, tokens) 0.3 n around what they are,
    matrices get noise of their scale (at least 0.5/sqrt(columns)) and an offset that differs by channel, so that no
    mean is zero by chance; running variances are positive. Other buffers (masks, rotary tables) stay as they are.

    Args:
        model: on the CPU, any floating dtype. Tied parameters are changed once.
        seed: of the noise.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            parameters = dict(module.named_parameters(recurse=False))
            for name, tensor in _floats(module):
                if id(tensor) in done or tensor.numel() == 0:
                    continue
                done.add(id(tensor))
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if name in parameters or (name in ("weight", "bias") and _is_norm(module)):  # frozen norms: buffers
                    tensor.copy_(_parameter(module, name, tensor.double(), noise))
                elif name == "running_var":
                    tensor.copy_(0.5 + noise.abs())
                elif name in ("running_mean", "running_phi"):
                    tensor.copy_(0.5 * noise)
    return model


def settle(model: nn.Module, call: Callable[[], object], seed: int = 0) -> nn.Module:
    """Give every norm with running statistics about those of what it reads in one call, in place.

    With statistics of another scale, a deep network's values grow from layer to layer until its outputs are no numbers,
    and then any two networks agree.

    Args:
        model: in eval mode, any floating dtype.
        call: runs it.
        seed: of the noise: a mean is off by about 0.3 root mean squares, a variance is 0.5 to 2 mean squares.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            return
        x, mean, variance = args[0].double(), module.running_mean, module.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        own = x.transpose(0, 1).flatten(1)
        # What hardly varies would be blown up, and its rounding with it, by every norm that it comes to.
        spread = own.square().mean(1).clamp_min(1e-3)
        noise = torch.randn(2, *mean.shape, generator=generator, dtype=torch.float64)
        mean.copy_(own.mean(1) + 0.3 * noise[0] * spread.sqrt())
        variance.copy_(spread * (0.5 + noise[1].abs().clamp_max(1.5)))

    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            buffers = dict(module.named_buffers(recurse=False))
            if {"running_mean", "running_var"} <= set(buffers) and buffers["running_var"] is not None:
                stack.callback(module.register_forward_pre_hook(hook).remove)
        call()
    return model


def _parameter(module: nn.Module, name: str, old: Tensor, noise: Tensor) -> Tensor:
    """The new value of one parameter, float64."""
    if not bool(torch.isfinite(old).all()):  # memory that the library left uninitialised
        old = torch.zeros_like(old)
    if _is_norm(module) and "weight" in name:
        return 1.0 + 0.3 * noise
    if "bias" in name and old.ndim <= 2:
        return 0.3 * noise
    if old.ndim <= 1:
        scale = float(old.abs().mean()) if old.numel() else 0.0
        return old.clamp(-3.0, 3.0) + 0.3 * noise * max(min(scale, 1.0), 0.1)
    width = old.numel() / old.shape[0]
    scale = min(max(float(old.std()) if old.numel() > 1 else 0.0, 0.02, 0.5 * width**-0.5), 1.0)
    old = old.clamp(-10.0 * scale, 10.0 * scale)
    rows = noise.flatten(1)[:, :1].reshape(-1, *[1] * (old.ndim - 1))  # an offset that differs by output channel
    return old + scale * (noise + 0.3 * rows)
