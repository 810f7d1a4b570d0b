"""What a zoo hands out: one model that can be built for real and on the meta device, with its norms counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from normconvert.tracing.constant_buffers import following_integers

MAX_PARAMETERS = 400_000_000
"""A larger model is skipped: float64 copies of it, original and converted, would not fit beside each other."""


class Skipped(Exception):
    """The model is left out of the sweep; the message says why."""


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: the model type (transformers) or model name (timm).
        library: ``transformers`` or ``timm``.
        model_class: name of the class that is built, with its task head.
        shrink: what was made smaller, for the table (``widths/8``, ``depth``, ``none``).
        build: the model on CPU in float32, eval mode, random weights, *every* parameter perturbed deterministically.
        skeleton: the same model on the meta device, eval mode, in no time.
        layernorms: number of LayerNorm-like modules.
        batchnorms: number of BatchNorm-like modules.
        parameters: number of parameters.
    """

    name: str
    library: str
    model_class: str
    shrink: str
    build: Callable[[], nn.Module]
    skeleton: Callable[[], nn.Module]
    layernorms: int
    batchnorms: int
    parameters: int


def is_layernorm(module: nn.Module) -> bool:
    """Whether the module normalises as LayerNorm does: by its class, or, for classes written by hand, by its name."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm):
        return True
    # "T5LayerNorm" and its kin are RMS norms in all but name; a container such as ConvDropoutLayerNorm is not a norm.
    is_leaf = next(module.children(), None) is None
    return is_leaf and "layernorm" in name.lower() and not is_rmsnorm(module)


def is_rmsnorm(module: nn.Module) -> bool:
    """Whether the module divides by a root mean square without taking the mean off."""
    name = type(module).__name__
    return isinstance(module, nn.RMSNorm) or "RMS" in name.upper() or bool(RMS_BY_NAME.fullmatch(name))


RMS_BY_NAME = re.compile(
    r"((Long|U?M|.*)T5|Pix2Struct|Pop2Piano|SwitchTransformers|Udop|CpmAnt|ImageGPT|Kosmos2_5)LayerNorm"
)
"""Classes of transformers that are called LayerNorm and are RMS norms (they never take the mean off)."""


def is_batchnorm(module: nn.Module) -> bool:
    """Whether the module is, in eval mode, an affine map per channel from running statistics."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return "BatchNorm" in type(module).__name__ and next(module.children(), None) is None


def perturbed(model: nn.Module, seed: int) -> None:
    """Perturb every parameter and running statistic in place, as the tests do."""
    try:
        from tests.support.perturb import perturb
    except ImportError:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand(buffer.shape, generator=generator))
        return
    perturb(model, seed)


def make_case(name: str, library: str, shrink: str, construct: Callable[[], nn.Module], seed: int = 0) -> Case:
    """Build once on the meta device, count the norms, and return the case.

    Raises:
        Skipped: the model has more than :data:`MAX_PARAMETERS` parameters.
        Exception: whatever the library raises when it cannot build the model on the meta device.
    """

    def skeleton() -> nn.Module:
        with following_integers() as fill, torch.device("meta"):
            model = construct().eval().to("meta")  # torch.FloatTensor(n) takes no notice of the device in force
        fill(model)
        return model

    def build() -> nn.Module:
        torch.manual_seed(seed)
        model = construct().eval()
        perturbed(model, seed)
        return model

    model = skeleton()
    modules = list(model.modules())
    layernorms = sum(map(is_layernorm, modules))
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise Skipped(
            f"{parameters / 1e6:.0f}M parameters, more than {MAX_PARAMETERS / 1e6:.0f}M ({layernorms} LayerNorms)"
        )
    return Case(
        name=name,
        library=library,
        model_class=type(model).__name__,
        shrink=shrink,
        build=build,
        skeleton=skeleton,
        layernorms=layernorms,
        batchnorms=sum(map(is_batchnorm, modules)),
        parameters=parameters,
    )
