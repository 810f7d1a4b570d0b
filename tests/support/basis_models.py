"""Small models with random weights for the changes of basis, and a run of them in float64 throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normconvert.compat.transformers import plain_experts

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    **TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 12}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
GPT2 = {**TOKENS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **SIZES, "moe_intermediate_size": 40, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4,
}  # fmt: skip
OPT = {**SIZES, "word_embed_proj_dim": 48, "ffn_dim": 56, "max_position_embeddings": 64}

MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, GROUPED),
    "llama tied": (hf.LlamaConfig, hf.LlamaForCausalLM, {**GROUPED, "tie_word_embeddings": True}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, GROUPED),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, GROUPED),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, GROUPED),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, GROUPED),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, GROUPED),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM, GROUPED),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, GROUPED),
    "glm": (hf.GlmConfig, hf.GlmForCausalLM, GROUPED),
    "granite": (hf.GraniteConfig, hf.GraniteForCausalLM, GROUPED),
    "olmo": (hf.OlmoConfig, hf.OlmoForCausalLM, GROUPED),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, EXPERTS),
    "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM, EXPERTS),
    "deepseek_v2": (hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM, {**LATENT, "topk_method": "greedy"}),
    "deepseek_v3": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, LATENT),
    "cohere": (hf.CohereConfig, hf.CohereForCausalLM, GROUPED),
    "bloom": (hf.BloomConfig, hf.BloomForCausalLM, {**TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, GPT2),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, OPT),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, SIZES),
    "falcon": (hf.FalconConfig, hf.FalconForCausalLM, SIZES),
    "vit": (hf.ViTConfig, hf.ViTForImageClassification, IMAGE),
}


def built(name: str) -> nn.Module:
    """A model with perturbed weights in float32: gains and biases that are no ones and zeros."""
    config, kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else 0.1))
    result: nn.Module = model
    return result


def skeleton(name: str) -> nn.Module:
    """The same on the meta device."""
    config, kind, sizes = MODELS[name]
    with torch.device("meta"):
        result: nn.Module = kind(config(**sizes)).eval()
    return result


class _Wide(TorchDispatchMode):
    """Casts to float32, which many norms do whatever the model's dtype, are to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logits(model: nn.Module, *, wide: bool = True) -> Tensor:
    """What a model says of a fixed input, in float64 throughout if ``wide``."""
    torch.manual_seed(1)
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(3, 64, (2, 9))}
    if hasattr(model.config, "image_size"):
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=next(model.parameters()).dtype)}
    for module in model.modules():  # by one kernel whatever the dtype: another rounds otherwise
        plain_experts(getattr(module, "config", None))
    run: Callable[..., Any] = model
    with torch.no_grad():
        if not wide:
            return run(**inputs).logits
        with _Wide():
            return run(**inputs).logits
