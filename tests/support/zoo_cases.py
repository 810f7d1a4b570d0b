"""Small models with random perturbed weights for every architecture that the project makes a claim about.

Each row says what is expected of a default ``rmsnorm`` conversion: every LayerNorm converts (``complete``), some do
(``partial``, the note says which stay), or none does (``none``). Rows whose expectation needs an option carry it.
Sizes are small and *distinct* (48 channels, 3 heads, vocabulary 101), so that a mistaken axis shows itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

COMPLETE, PARTIAL, NONE = "complete", "partial", "none"


@dataclass(frozen=True)
class NamedCase:
    """One row.

    Attributes:
        name: unique name, for test ids.
        library: ``transformers`` or ``timm``.
        expect: ``complete``, ``partial`` or ``none``.
        construct: builds the model with the library's own initialisation on the current default device.
        note: for partial and none, what stays and why.
        options: options of the conversion that the expectation is for (``min_gain``, ``allow_shifted_outputs``).
    """

    name: str
    library: str
    expect: str
    construct: Callable[[], nn.Module]
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """The model on CPU in float32, eval mode, every parameter and running statistic perturbed."""
        from tests.support.perturb import perturb

        torch.manual_seed(seed)
        model = self.construct().eval()
        perturb(model, seed)
        return model

    def skeleton(self) -> nn.Module:
        """The same model on the meta device, eval mode."""
        with torch.device("meta"):
            return self.construct().eval()


Row = tuple[Any, ...]
"""(name, model class or timm name, arguments, expectation, note, options); the last two may be left out."""

HEAD_NORM = "the language-model head's norm reads a GELU: one centring would win one norm"

TOKENS: dict[str, Any] = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
GQA: dict[str, Any] = {**DECODER, "num_attention_heads": 6, "num_key_value_heads": 2}
GPT: dict[str, Any] = {**TOKENS, "n_layer": 2, "n_embd": 48, "n_head": 3, "n_positions": 64}
SEQ2SEQ: dict[str, Any] = {
    **TOKENS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
}
ENCODER: dict[str, Any] = {**DECODER, "type_vocab_size": 2}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
STAGES: dict[str, Any] = {
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [16, 32, 48, 64],
    "num_attention_heads": [1, 2, 3, 4],
    "image_size": 64,
    "num_labels": 5,
}
DEPTH: dict[str, Any] = {**STAGES, "decoder_hidden_size": 24}
WHISPER: dict[str, Any] = {
    **SEQ2SEQ,
    "num_mel_bins": 12,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

# fmt: off
TRANSFORMERS: list[Row] = [
    ("gpt2", "GPT2LMHeadModel", GPT, COMPLETE),
    ("gpt_neo", "GPTNeoForCausalLM", {**TOKENS, "hidden_size": 48, "num_layers": 2, "num_heads": 3, "window_size": 4,
     "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}, COMPLETE),
    ("gptj", "GPTJForCausalLM", {**GPT, "rotary_dim": 8, "tie_word_embeddings": False}, COMPLETE),
    ("gpt_neox", "GPTNeoXForCausalLM", DECODER, COMPLETE),
    ("gpt_neox_sequential", "GPTNeoXForCausalLM", {**DECODER, "use_parallel_residual": False}, COMPLETE),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", GPT, COMPLETE),
    ("codegen", "CodeGenForCausalLM", {**GPT, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_ctx": 64}, COMPLETE),
    ("opt", "OPTForCausalLM", {**TOKENS, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80,
     "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64}, COMPLETE),
    ("opt_350m", "OPTForCausalLM", {**TOKENS, "hidden_size": 48, "word_embed_proj_dim": 24, "ffn_dim": 80,
     "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64, "do_layer_norm_before": False},
     NONE, "Post-LN"),
    ("bloom", "BloomForCausalLM", {**TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 3}, COMPLETE),
    ("mpt", "MptForCausalLM", {**TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, COMPLETE),
    ("falcon_7b", "FalconForCausalLM", {**TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
     "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False, "alibi": False},
     COMPLETE),
    ("falcon_new_decoder", "FalconForCausalLM", {**TOKENS, "hidden_size": 48, "num_hidden_layers": 2,
     "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "alibi": False},
     COMPLETE),
    ("falcon_rw", "FalconForCausalLM", {**TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
     "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "bias": True, "alibi": True},
     COMPLETE),
    ("phi", "PhiForCausalLM", DECODER, COMPLETE),
    ("stablelm", "StableLmForCausalLM", GQA, COMPLETE),
    ("stablelm_parallel", "StableLmForCausalLM", {**GQA, "use_parallel_residual": True}, COMPLETE),
    ("starcoder2", "Starcoder2ForCausalLM", GQA, COMPLETE),
    ("olmo", "OlmoForCausalLM", GQA, COMPLETE),
    ("nemotron", "NemotronForCausalLM", {**GQA, "head_dim": 8}, COMPLETE),
    ("cohere", "CohereForCausalLM", GQA, COMPLETE),
    ("cohere2", "Cohere2ForCausalLM", {**GQA, "head_dim": 8, "sliding_window": 4,
     "layer_types": ["sliding_attention", "full_attention"]}, COMPLETE),
    ("xglm", "XGLMForCausalLM", {**TOKENS, "d_model": 48, "ffn_dim": 80, "num_layers": 2, "attention_heads": 3,
     "max_position_embeddings": 64}, COMPLETE),
    ("biogpt", "BioGptForCausalLM", DECODER, COMPLETE),
    ("rwkv", "RwkvForCausalLM", {**TOKENS, "hidden_size": 48, "attention_hidden_size": 48, "intermediate_size": 80,
     "num_hidden_layers": 2, "context_length": 64}, PARTIAL,
     "each gated feed-forward writes what cannot be centred, and a centring behind it wins two norms"),
    ("rwkv_min_gain_1", "RwkvForCausalLM", {**TOKENS, "hidden_size": 48, "attention_hidden_size": 48,
     "intermediate_size": 80, "num_hidden_layers": 2, "context_length": 64}, COMPLETE, "", {"min_gain": 1}),
    ("whisper", "WhisperForConditionalGeneration", WHISPER, COMPLETE),
    ("m2m_100", "M2M100ForConditionalGeneration", SEQ2SEQ, COMPLETE),
    ("mbart", "MBartForConditionalGeneration", SEQ2SEQ, COMPLETE),
    ("pegasus", "PegasusForConditionalGeneration", SEQ2SEQ, COMPLETE),
    ("blenderbot", "BlenderbotForConditionalGeneration", SEQ2SEQ, COMPLETE),
    ("vit", "ViTForImageClassification", VISION, COMPLETE),
    ("deit", "DeiTForImageClassification", VISION, COMPLETE),
    ("deit_distilled", "DeiTForImageClassificationWithTeacher", VISION, COMPLETE),
    ("dinov2", "Dinov2Model", {**VISION, "mlp_ratio": 2}, COMPLETE),
    ("dinov2_classifier", "Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, COMPLETE),
    ("dinov2_with_registers", "Dinov2WithRegistersModel", {**VISION, "mlp_ratio": 2, "num_register_tokens": 3},
     COMPLETE),
    ("dinov3_vit", "DINOv3ViTModel", {**VISION, "num_register_tokens": 3}, COMPLETE),
    ("beit", "BeitForImageClassification", {**VISION, "layer_scale_init_value": 0.1,
     "use_relative_position_bias": True}, COMPLETE),
    ("data2vec_vision", "Data2VecVisionForImageClassification", {**VISION, "use_relative_position_bias": True},
     COMPLETE),
    ("segformer", "SegformerForImageClassification", {**STAGES, "sr_ratios": [4, 2, 1, 1]}, COMPLETE),
    ("segformer_semantic", "SegformerForSemanticSegmentation", {**DEPTH, "sr_ratios": [4, 2, 1, 1]}, COMPLETE),
    ("yolos", "YolosForObjectDetection", {**VISION, "image_size": [32, 40], "num_detection_tokens": 4}, COMPLETE),
    ("vit_msn", "ViTMSNForImageClassification", VISION, COMPLETE),
    ("vit_msn_base", "ViTMSNModel", VISION, COMPLETE),
    ("ijepa", "IJepaModel", VISION, COMPLETE),
    ("dpt", "DPTForDepthEstimation", {**VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
     "neck_hidden_sizes": [12, 16, 20, 24], "fusion_hidden_size": 12, "is_hybrid": False, "image_size": 32}, NONE,
     "the depth head's neck reads the raw hidden states through linear maps"),
    ("dpt_base", "DPTModel", {**VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
     "neck_hidden_sizes": [12, 16, 20, 24], "fusion_hidden_size": 12, "is_hybrid": False, "image_size": 32}, COMPLETE),
    ("pvt_v2", "PvtV2ForImageClassification", {**STAGES, "sr_ratios": [4, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
     COMPLETE),
    ("mobilevit", "MobileViTForImageClassification", {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16,
     20, 24, 28, 64],
     "num_attention_heads": 4, "image_size": 64, "num_labels": 5}, COMPLETE),
    ("glpn", "GLPNForDepthEstimation", {**DEPTH, "sr_ratios": [4, 2, 1, 1], "decoder_hidden_size": 16}, COMPLETE),
    ("clip_text", "CLIPTextModelWithProjection", {**DECODER, "projection_dim": 24}, COMPLETE),
    ("clip_text_base", "CLIPTextModel", DECODER, COMPLETE),
    ("siglip_text", "SiglipTextModel", {**DECODER, "projection_size": 24}, COMPLETE),
    ("esm2", "EsmForMaskedLM", {**ENCODER, "vocab_size": 33, "mask_token_id": 32, "position_embedding_type": "rotary",
     "emb_layer_norm_before": False, "token_dropout": True}, PARTIAL, HEAD_NORM),
    ("esm2_min_gain_1", "EsmForMaskedLM", {**ENCODER, "vocab_size": 33, "mask_token_id": 32,
     "position_embedding_type": "rotary", "emb_layer_norm_before": False, "token_dropout": True}, COMPLETE, "",
     {"min_gain": 1}),
    ("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", ENCODER, PARTIAL, HEAD_NORM),
    ("roberta_prelayernorm_min_gain_1", "RobertaPreLayerNormForMaskedLM", ENCODER, COMPLETE, "", {"min_gain": 1}),
    ("megatron_bert", "MegatronBertForMaskedLM", ENCODER, PARTIAL, HEAD_NORM),
    ("megatron_bert_min_gain_1", "MegatronBertForMaskedLM", ENCODER, COMPLETE, "", {"min_gain": 1}),
    ("xlm_roberta_xl", "XLMRobertaXLForMaskedLM", ENCODER, PARTIAL, HEAD_NORM),
    ("xlm_roberta_xl_min_gain_1", "XLMRobertaXLForMaskedLM", ENCODER, COMPLETE, "", {"min_gain": 1}),
    # partly
    ("hiera_hf", "HieraForImageClassification", {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8],
     "image_size": [64, 64], "masked_unit_size": [8, 8], "query_stride": [2, 2], "num_query_pool": 3, "num_labels": 5},
     PARTIAL, "a norm that shares a block with max pooling stays"),
    ("phimoe", "PhimoeForCausalLM", {**GQA, "num_local_experts": 4, "sliding_window": None}, COMPLETE),
    ("swin_hf", "SwinForImageClassification", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
     "image_size": 32, "patch_size": 4, "num_labels": 5}, PARTIAL, "patch merging's norm reads concatenated tokens"),
    ("swinv2_hf", "Swinv2ForImageClassification", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
     "window_size": 4, "image_size": 32, "patch_size": 4, "num_labels": 5}, PARTIAL, "its merges stay"),
    ("modernbert", "ModernBertForMaskedLM", {**DECODER, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
     PARTIAL, "the embedding norm's output is the stream"),
    ("siglip_vision", "SiglipVisionModel", VISION, PARTIAL, "the pooling head's norm stays"),
    ("persimmon", "PersimmonForCausalLM", DECODER, PARTIAL, "the q/k norms stay"),
    ("clip_vision", "CLIPVisionModel", VISION, PARTIAL, "last_hidden_state is the raw stream"),
    ("clip_vision_shifted", "CLIPVisionModel", VISION, COMPLETE, "", {"allow_shifted_outputs": True}),
    ("cvt", "CvtForImageClassification", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3],
     "num_labels": 5}, PARTIAL, "the stage embeddings' norms make the stream"),
    ("focalnet_hf", "FocalNetForImageClassification", {"embed_dim": 16, "hidden_sizes": [32, 64], "depths": [1, 2],
     "image_size": 32, "patch_size": 4, "focal_levels": [2, 2], "focal_windows": [3, 3], "num_labels": 5}, PARTIAL,
     "norms behind gated focal modulation stay"),
    ("bert", "BertForSequenceClassification", ENCODER, PARTIAL, "Post-LN: only the embedding norm converts"),
    # not at all
    ("convnext_hf", "ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1],
     "image_size": 64, "num_labels": 5}, PARTIAL,
     "the trunk stays: the depthwise convolution before each norm writes each channel alone; the stem's norm converts"),
    ("openai_gpt", "OpenAIGPTLMHeadModel", GPT, NONE, "Post-LN"),
    ("llama", "LlamaForCausalLM", GQA, NONE, "nothing to do: RMSNorm already"),
]
# fmt: on

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
VIT16 = "vit_tiny_patch16_224"

# fmt: off
TIMM: list[Row] = [
    ("timm_vit_token", VIT16, VIT, COMPLETE),
    ("timm_vit_avg_fc_norm", VIT16, {**VIT, "global_pool": "avg", "fc_norm": True, "class_token": False}, COMPLETE),
    ("timm_vit_avg", VIT16, {**VIT, "global_pool": "avg", "fc_norm": False}, COMPLETE),
    ("timm_vit_pre_norm", VIT16, {**VIT, "pre_norm": True}, COMPLETE),
    ("timm_vit_layer_scale", VIT16, {**VIT, "init_values": 0.3}, COMPLETE),
    ("timm_vit_registers", VIT16, {**VIT, "reg_tokens": 3, "no_embed_class": True}, COMPLETE),
    ("timm_vit_parallel_things", "vit_small_patch16_18x2_224", {**VIT, "init_values": 0.3}, COMPLETE),
    ("timm_vit_parallel_scaling", "vit_tiny_patch16_224", {**VIT, "block_fn": "ParallelScalingBlock"}, COMPLETE),
    ("timm_deit3", "deit3_small_patch16_224", VIT, COMPLETE),
    ("timm_beit", "beit_base_patch16_224", VIT, COMPLETE),
    ("timm_cait", "cait_xxs24_224", {**VIT, "init_values": 0.3}, COMPLETE),
    ("timm_convit", "convit_tiny", {**VIT, "embed_dim": 16, "local_up_to_layer": 1}, COMPLETE),
    ("timm_crossvit", "crossvit_tiny_240", {"img_scale": (1.0, 224 / 240), "embed_dim": (24, 48), "num_heads": (3, 3),
     "depth": ((1, 1, 0), (1, 1, 0)), "mlp_ratio": (2, 2, 1), "num_classes": 5}, COMPLETE),
    ("timm_naflexvit", "naflexvit_base_patch16_gap", {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5,
     "img_size": 64}, COMPLETE),
    ("timm_pvt_v2", "pvt_v2_b0", {"depths": (1, 2, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4),
     "num_classes": 5}, COMPLETE),
    ("timm_mobilevit", "mobilevit_xxs", {"num_classes": 5}, COMPLETE),
    ("timm_vit_relpos", "vit_relpos_small_patch16_224", VIT, COMPLETE),
    ("timm_vit_srelpos", "vit_srelpos_small_patch16_224", VIT, COMPLETE),
    ("timm_vit_hybrid", "vit_tiny_r_s16_p8_224", {"embed_dim": 48, "depth": 2, "num_classes": 5, "img_size": 32},
     COMPLETE),
    # partly
    ("timm_hiera", "hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 2, 1, 1), "num_classes": 5,
     "mask_unit_size": (4, 4), "q_pool": 2}, PARTIAL, "a norm that shares a block with max pooling stays"),
    ("timm_mlp_mixer", "mixer_s32_224", {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 48,
     "num_classes": 5}, PARTIAL, "token mixing writes tokens, not channels: behind it nothing gains enough"),
    ("timm_mlp_mixer_min_gain_1", "mixer_s32_224", {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 48,
     "num_classes": 5}, COMPLETE, "", {"min_gain": 1}),
    ("timm_swin", "swin_tiny_patch4_window7_224", {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
     "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}, PARTIAL, "patch merging's norm stays"),
    ("timm_swin_v2", "swinv2_tiny_window8_256", {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
     "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}, PARTIAL, "its merges stay"),
    ("timm_eva", "eva02_tiny_patch14_224", {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2,
     "num_heads": 3, "num_classes": 5, "scale_mlp": True}, PARTIAL, "the inner sub-norms stay"),
    ("timm_vit_map_pool", VIT16, {**VIT, "global_pool": "map", "class_token": False}, PARTIAL,
     "the attention pooling head's norm stays"),
    ("timm_focalnet", "focalnet_tiny_srf", {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_classes": 5}, PARTIAL,
     "norms behind gated focal modulation stay"),
    # not at all
    ("timm_convnext", "convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40), "num_classes": 5}, PARTIAL,
     "the trunk stays: the depthwise convolution before each norm writes each channel alone; the stem's norm converts"),
]
# fmt: on

IMAGE_SIDES = {"timm_crossvit": 240, "timm_pvt_v2": 64, "timm_mobilevit": 64, "timm_focalnet": 64, "timm_convnext": 64}
"""Sides of the square images for models that do not fix one by ``img_size``."""


FIXED_ARGUMENTS = {
    "mixer_s32_224": ("mlp_mixer", "_create_mixer"),
    "focalnet_tiny_srf": ("focalnet", "_create_focalnet"),
}
"""Models whose public constructor fixes the sizes: timm module and its function that leaves them open."""


def named_cases() -> dict[str, NamedCase]:
    """Every row as a case, by name."""
    cases = [_case("transformers", _transformers, row) for row in TRANSFORMERS]
    cases += [_case("timm", _timm, row) for row in TIMM]
    return {case.name: case for case in cases}


def _case(library: str, make: Callable[..., nn.Module], row: Row) -> NamedCase:
    name, model, arguments, expect = row[:4]
    note = row[4] if len(row) > 4 else ""
    options = row[5] if len(row) > 5 else {}
    return NamedCase(name, library, expect, lambda: make(name, model, arguments), note, options)


def _transformers(name: str, model: str, arguments: dict[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, model)
    built: nn.Module = cls(cls.config_class(**arguments))
    return built


def _timm(name: str, model: str, arguments: dict[str, Any]) -> nn.Module:
    import timm
    from timm.models import vision_transformer

    arguments = dict(arguments)
    if isinstance(arguments.get("block_fn"), str):
        arguments["block_fn"] = getattr(vision_transformer, arguments["block_fn"])
    size = IMAGE_SIDES.get(name, arguments.get("img_size", 32))
    height, width = size if isinstance(size, tuple) else (size, size)
    create: Callable[..., nn.Module] = timm.create_model
    if model in FIXED_ARGUMENTS:
        module, function = FIXED_ARGUMENTS[model]
        create = getattr(importlib.import_module(f"timm.models.{module}"), function)
    return create(model, pretrained=False, pretrained_cfg_overlay={"input_size": (3, height, width)}, **arguments)
