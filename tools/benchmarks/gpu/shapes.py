"""Models in well-known shapes, made on the device with random weights, and the same converted in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.files.uninitialised import NoRandomInit
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits
from normconvert.rewrites.planning import plan_model
from normconvert.runtime import apply_module_edits
from normconvert.tracing.model_graph import trace_model
from normconvert.verification.algebra import named_tensors
from normconvert.verification.probe_runs import default_dtype

RMSNORM, FOLDED, CRMSNORM = "rmsnorm", "rmsnorm --fold", "crmsnorm"
CONVERSIONS: dict[str, tuple[str, Options]] = {
    RMSNORM: ("rmsnorm", Options()),
    FOLDED: ("rmsnorm", Options(fold=True)),
    CRMSNORM: ("crmsnorm", Options()),
}
"""Version -> method and options that make it."""
POSITIONS = 2048 + 64
"""Tokens that the language models take; GPT-2's own 1,024 would not do for the long prompts."""


@dataclass(frozen=True)
class Shape:
    """A model to be made.

    Attributes:
        title: for the pages.
        library: ``transformers`` or ``timm``.
        kind: what transformers' classes begin with, or timm's name.
        sizes: arguments of the configuration, or of the model.
        toy: those that make a toy of it.
    """

    title: str
    library: str
    kind: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    toy: Mapping[str, Any] = field(default_factory=dict)


_GPT2_TOY = {
    "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 400, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOY = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 400,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VIT_TOY = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 10}
SHAPES = {
    "gpt2": Shape("GPT-2 small", "transformers", "GPT2", {"n_positions": POSITIONS}, _GPT2_TOY),
    "gpt2-xl": Shape(
        "GPT-2 XL", "transformers", "GPT2", {"n_positions": POSITIONS, "n_embd": 1600, "n_layer": 48, "n_head": 25},
        _GPT2_TOY,
    ),
    "pythia-1.4b": Shape(
        "Pythia-1.4B", "transformers", "GPTNeoX",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192,
         "vocab_size": 50304, "max_position_embeddings": POSITIONS},
        _TOY,
    ),
    "pythia-6.9b": Shape(
        "Pythia-6.9B", "transformers", "GPTNeoX",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 16384,
         "vocab_size": 50432},
        _TOY,
    ),
    "llama-1b": Shape(
        "Llama-1B-like", "transformers", "Llama",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": POSITIONS},
        {**_TOY, "num_key_value_heads": 2},
    ),
    "vit-b": Shape("ViT-B/16", "timm", "vit_base_patch16_224", {}, _VIT_TOY),
    "vit-l": Shape("ViT-L/16", "timm", "vit_large_patch16_224", {}, _VIT_TOY),
}  # fmt: skip


def build(
    name: str, small: bool, dtype: torch.dtype, device: torch.device, changes: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model in eval mode, random on any device but the meta device.

    Args:
        name: a key of :data:`SHAPES`.
        small: make the toy.
        dtype: of its parameters.
        device: where it is made.
        changes: to its sizes.
    """
    shape = SHAPES[name]
    sizes = {**shape.sizes, **(shape.toy if small else {}), **(changes or {})}
    with default_dtype(dtype), device, NoRandomInit():
        model = _made(shape, sizes)
    model.eval().requires_grad_(False)
    return model if device.type == "meta" else randomise(model)


def _made(shape: Shape, sizes: Mapping[str, Any]) -> nn.Module:
    if shape.library == "timm":
        import timm

        model: nn.Module = timm.create_model(shape.kind, **sizes)
        return model
    import transformers

    config = getattr(transformers, f"{shape.kind}Config")(**sizes)
    head = "GPT2LMHeadModel" if shape.kind == "GPT2" else f"{shape.kind}ForCausalLM"
    made: nn.Module = getattr(transformers, head)(config)
    return made


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters, where they are: norms' weights around one, matrices small enough for deep models.

    Args:
        model: in place.
        seed: of the device's own generator: other devices draw other numbers.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.mul_(5.0).add_(1.0)
    return model


@lru_cache(maxsize=8)
def plans_of(name: str, small: bool) -> dict[str, Plan]:
    """Version -> plan, of those that convert any norm; from one trace on the meta device."""
    skeleton = build(name, small, torch.float32, torch.device("meta"))
    graph = trace_model(skeleton)
    plans = {
        version: plan_model(skeleton, options, method, lambda _: graph)
        for version, (method, options) in CONVERSIONS.items()
    }
    return {version: plan for version, plan in plans.items() if plan.converted}


def edited(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model as a conversion by ``plan`` leaves it: edits in float64, stored in each tensor's own dtype.

    Args:
        model: on any device, unchanged.
        plan: its module edits stand as they are in a converted checkpoint.
    """
    source = named_tensors(model)
    result = copy.deepcopy(model)
    apply_module_edits(result, plan.modules)
    target = named_tensors(result)
    for name, edits in plan.tensors.items():
        first = edits[0]["op"] if edits else ""
        like = source[edits[0].get("like", edits[0].get("from", name))] if first in ("new", "copy") else source[name]
        value = apply_edits(like, edits, source.__getitem__).to(like.device, like.dtype)
        if first == "copy" or name not in target:
            path, _, leaf = name.rpartition(".")
            result.get_submodule(path).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            target[name].data = value
    return result.eval().requires_grad_(False)


def norm_paths(model: nn.Module) -> list[str]:
    """Module paths of all norms, by their classes' names."""
    return [path for path, module in model.named_modules() if type(module).__name__.endswith("Norm")]


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64 on the CPU."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((a - b).norm() / b.norm())
