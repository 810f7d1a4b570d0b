"""A model in memory without its weights: what is traced of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconvert.errors import InputError, first_line
from normconvert.tracing.model_copy import copy_model, plain_tensors


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its parameters and buffers on the meta device, in eval mode; ``model`` stays as it is.

    Integer buffers that no checkpoint holds keep their values, on the CPU, as those of a skeleton do that was built
    there (:mod:`normconvert.tracing.constant_buffers`). So do tensors that modules hold beside parameters and buffers.

    Raises:
        InputError: the model cannot be copied.
    """
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    made: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        constant = id(tensor) not in stored and not (tensor.is_floating_point() or tensor.is_complex())
        made[id(tensor)] = tensor.detach().cpu().clone() if constant else _on_meta(tensor)
    for _, _, _, tensor in plain_tensors(model):
        made.setdefault(id(tensor), tensor.detach().cpu().clone())
    try:
        return copy_model(model, made=made).eval()
    except Exception as error:  # whatever a model holds that has no copy
        raise InputError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
