"""Fingerprints made from timm itself: for the index, for models it lacks, and for other arguments than the default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normconvert.identification.prints import CLASSES, Print, pattern
from normconvert.identification.result import Shape

if TYPE_CHECKING:
    from torch import nn

STATISTICS = ("running_mean", "running_var")
"""Buffers that are learnt: a model without them is broken."""
MANY_CLASSES = 1009
"""A number of classes that nothing else in a model has for its size: where it stands is the number of classes."""


def timm_print(name: str, **arguments: Any) -> Print:
    """The fingerprint of one timm model, from two builds on the meta device.

    Args:
        name: timm's model name.
        arguments: for ``timm.create_model``; without ``num_classes``.

    Raises:
        Exception: whatever timm raises when it cannot build the model.
    """
    # No name says for certain what is the classifier: what is gone without classes is.
    bare, whole = (build(name, num_classes=n, **arguments) for n in (0, MANY_CLASSES))
    core = shapes(bare)
    head = {
        name: tuple(CLASSES if n == MANY_CLASSES else n for n in shape)
        for name, shape in shapes(whole).items() if name not in core
    }  # fmt: skip
    buffers = {pattern(n) for n, b in whole.named_buffers() if b.is_floating_point() and not n.endswith(STATISTICS)}
    first: dict[int, str] = {}
    tied = []
    for tensor_name, tensor in bare.state_dict(keep_vars=True).items():
        # By identity, which keep_vars leaves as it is.
        known = first.setdefault(id(tensor), tensor_name)
        if known != tensor_name and tensor_name in core:
            tied.append((known, tensor_name))
    return Print(name, core, head, tuple(tied), frozenset(buffers.difference(map(pattern, core))))


def build(name: str, **arguments: Any) -> nn.Module:
    """A timm model on the meta device, or on the CPU where it computes on tensors while it is built."""
    import timm
    import torch

    from normconvert.files.uninitialised import NoRandomInit

    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    # Some models compute on their tensors while they are built, which fails in as many ways on the meta device.
    except Exception:
        with NoRandomInit():
            model = timm.create_model(name, pretrained=False, **arguments)
    return model


def shapes(model: nn.Module) -> dict[str, Shape]:
    """What a checkpoint of the model has to hold: parameters and running statistics."""
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
        if name not in buffers or name.endswith(STATISTICS)
    }  # fmt: skip


def default_image(name: str) -> int | None:
    """The side, in pixels, of the square images that a model takes by default."""
    import timm

    config = timm.get_pretrained_cfg(name)
    size = getattr(config, "input_size", None)
    return int(size[-1]) if size and size[-1] == size[-2] else None
