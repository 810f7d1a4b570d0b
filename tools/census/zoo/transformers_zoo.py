"""Every model type of the installed transformers, small, with its task head."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tools.census.zoo.case import Case, Skipped, make_case
from tools.census.zoo.shrink import LEVELS, Level, shrink

HEADS = (
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CAUSAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING",
    "MULTIMODAL_LM",
    "UNIVERSAL_SEGMENTATION",
    "KEYPOINT_DETECTION",
    "TIME_SERIES_PREDICTION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    None,  # the base model
    "PRETRAINING",
    "MASK_GENERATION",
    "AUDIO_TOKENIZATION",
    "IMAGE_TO_IMAGE",
    "IMAGE",
    "BACKBONE",
)
"""Tasks in order of preference; a type takes the class of the first task that lists it.

Whole models come before parts: an encoder-decoder before its decoder as a causal language model, a text-image model
before its image tower, and an encoder's masked language model (what its checkpoints are) before a causal one.
"""

RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 20, 24, 28], "depths": [1, 1, 1, 1],
          "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
DETR = {"use_timm_backbone": False, "backbone_config": {**RESNET, "out_features": ["stage4"]}}

GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
PE_VIDEO = {"vision_config": {"model_args": {"depth": 2, "embed_dim": 128, "img_size": 56}}}
REPVIT = {"model_type": "timm_wrapper", "architecture": "repvit_m1", "num_classes": 2,
          "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3],
                         "embed_dim": [6, 12, 24, 48], "depth": [1, 1, 1, 1]}}  # fmt: skip

REQUIRED: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 160, "vision_config": {"width_coefficient": 0.5, "depth_coefficient": 0.5}},
    "aria": {
        "vision_config": {"model_type": "idefics3_vision", "image_size": 490, "patch_size": 14},
        "projector_patch_to_query_dict": {16: 8, 1225: 128, 4900: 256},  # 16: those of a small image
    },
    "blip-2": {"image_token_index": 100},
    # A head's rotated part is shared by rows and columns, each in pairs: 160 channels in 16 heads cannot be.
    "ernie4_5_vl_moe": {"vision_config": {"num_heads": 8}},
    **{name: {"mm_tokens_per_image": 4} for name in ("gemma3", "shieldgemma2")},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    # Rows and columns share a head's rotated part: 144 channels in 16 heads cannot be.
    **{
        name: {"vision_config": {"num_heads": 12}}
        for name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni")
    },
    # The library asks a layer with attention how long its cache is.
    **{
        name: {
            "vision_config": {"num_heads": 12},
            "text_config": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        }
        for name in ("qwen3_5", "qwen3_5_moe")
    },
    "kimi_k25": {"vision_config": {"num_attention_heads": 12}},
    # Without a token that stands for an image or a sound they leave it out.
    **{name: {"image_token_id": 100, "video_token_id": 99} for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "voxtral": {"audio_token_id": 100},
    # Pictures of the sizes that two crops of 56 pixels fill.
    "llava_onevision": {"image_grid_pinpoints": [[56, 112], [112, 56]]},
    # What projects images does not fit the default language model.
    "janus": {"text_config": {"hidden_size": 2048}},
    "ovis2": {"hidden_size": 4096},
    "granite_speech": {"projector_config": {"encoder_hidden_size": 1024}},
    "granite_speech_plus": {"projector_config": {"encoder_hidden_size": 1024}},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    **{name: {"text_config": {"rope_parameters": GLM_ROPE}} for name in ("glm4v", "glm46v", "glmga")},
    "glm4v_moe": {"text_config": {"rope_parameters": GLM_ROPE, "head_dim": 128}},
    "colqwen2": {
        "vlm_config": {
            "model_type": "qwen2_vl",
            "text_config": {"rope_parameters": QWEN_ROPE},
            "vision_config": {"hidden_size": 8192, "embed_dim": 1024},
        }
    },
    "qwen2_vl": {"text_config": {"rope_parameters": QWEN_ROPE}, "vision_config": {"hidden_size": 8192, "num_heads": 8}},
    # With a mask, its attention wants heads as wide as the series is long, in the encoder and the decoder.
    "autoformer": {"prediction_length": 6, "context_length": 12, "d_model": 192},
    # Its encoder halves the series between layers, the mask not.
    "informer": {"prediction_length": 6, "context_length": 12, "distil": False},
    "time_series_transformer": {"prediction_length": 6, "context_length": 12},
    # The default shares a head's rotated part between rows and columns at this width only.
    "llama4": {"vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "vision_output_dim": 4096}},
    "pe_video_encoder": PE_VIDEO,
    "pe_video": {"video_config": PE_VIDEO},
    "pe_audio_video_encoder": {"video_config": PE_VIDEO},
    "pe_audio_video": {"audio_video_config": {"video_config": PE_VIDEO}},
    # Its default names the backbone by a key that is misspelt, and so gets a ResNet-50 of other widths.
    "edgetam": {"vision_config": {"backbone_config": REPVIT, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
    "edgetam_vision_model": {"backbone_config": REPVIT},
    "tvp": {"num_frames": 4, "max_img_size": 224, "visual_prompter_size": 48},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "step3p7": {"text_config": {"sliding_window": 512}},
    # Without them the last lines of its forward look up None; an image of 64 pixels has fewer than 300 places.
    "pp_doclayout_v2": {"num_queries": 30, "class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    # The default is the recogniser's backbone: the last stage alone, and strides that the neck cannot undo.
    "pp_ocrv6_small_det": {
        "neck_out_channels": 16,
        "layer_list_out_channels": [16, 16, 24, 28],
        "backbone_config": {
            "model_type": "pp_lcnet_v4",
            "stem_channels": [3, 8, 16],
            "block_configs": [
                [[3, 16, 16, 1, True], [3, 16, 16, 1, False]],
                [[3, 16, 16, 2, False]],
                [[3, 16, 24, 2, False]],
                [[3, 24, 28, 2, True]],
            ],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    },
    # Its default is timm's Swin, which no configuration makes smaller, and whose channels come last.
    "omdet-turbo": {
        "num_queries": 30,
        "apply_layernorm_after_vision_backbone": False,
        "backbone_config": {
            "model_type": "swin",
            "image_size": 640,
            "depths": [1, 1, 1, 1],
            "out_features": ["stage2", "stage3", "stage4"],
        },
    },
    "conditional_detr": DETR,
    "dab-detr": DETR,
    "deformable_detr": {"use_timm_backbone": False, "backbone_config": RESNET},
    "detr": DETR,
    "table-transformer": DETR,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    # Its neck joins all stages, of which the default backbone returns the last.
    "uvdoc": {"backbone_config": {"model_type": "uvdoc_backbone", "out_features": [f"stage{n}" for n in range(1, 7)]}},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
"""Values without which a type's own default configuration does not build (they are None or name a file to download).

Coefficients of an EfficientNet, which is hundreds of layers deep by default, are here as well.
"""

CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "upernet": "UperNetForSemanticSegmentation",
}
"""Types whose task table names a part of the model first."""


def transformers_types() -> list[str]:
    """Every model type, sorted."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


@functools.cache
def model_classes() -> dict[str, tuple[str, ...]]:
    """Model type -> names of its classes, the preferred one first."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    classes: dict[str, list[str]] = {}
    for head in HEADS:
        table = getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES", {})
        for model_type, name in table.items():
            classes.setdefault(model_type, []).extend([name] if isinstance(name, str) else name)
    return {k: tuple(dict.fromkeys(v)) for k, v in classes.items()}


def transformers_case(model_type: str, first_level: int = 0) -> tuple[Case, int]:
    """The smallest build of one model type.

    Args:
        model_type: a key of ``CONFIG_MAPPING``.
        first_level: index into ``LEVELS`` to begin at; a caller that found the model built but not runnable goes on
            from the next.

    Returns:
        The case, and the index of the level it was built at.

    Raises:
        Skipped: nothing builds, with the reason of the default configuration; or the model is too large.
    """
    import transformers

    names = model_classes().get(model_type)
    if not names:
        raise Skipped("no model class of its own (a part of another model's configuration)")
    name = CLASSES.get(model_type, names[0])
    cls = getattr(transformers, name, None)
    if cls is None:
        raise Skipped(f"class {name} is not exported")
    try:
        config = transformers.CONFIG_MAPPING[model_type](**REQUIRED.get(model_type, {}))
    except Exception as error:
        raise Skipped(f"default configuration: {_line(error)}") from error
    reason = Skipped("no level of shrinking builds")
    for index, level in enumerate(LEVELS):
        if index < first_level:
            continue
        try:
            return make_case(model_type, "transformers", str(level), _constructor(cls, config, level)), index
        except Skipped as error:
            reason = error
        except Exception as error:  # any library error: the next level may do, and the last one's says why not
            reason = Skipped(f"{cls.__name__}: {_line(error)}")
    raise reason


def _constructor(cls: Any, config: Any, level: Level) -> Any:
    def construct() -> nn.Module:
        # A configuration is mutated by some constructors, so each model gets its own.
        model: nn.Module = cls(shrink(config, level, REQUIRED.get(config.model_type, {})))
        return model

    return construct


def transformers_models() -> Iterator[Case]:
    """Every model type that builds; the ones that do not are passed over (``transformers_case`` says why)."""
    for model_type in transformers_types():
        try:
            yield transformers_case(model_type)[0]
        except Skipped:
            continue


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(text)[:160] if text else ''}"
