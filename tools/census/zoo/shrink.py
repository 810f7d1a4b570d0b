"""Make a configuration of transformers small without knowing the model.

One idea: divide every width of the whole tree of configurations (text, vision, backbone, ...) by the *same* ratio and
leave the number of heads and groups alone. Whatever must be equal stays equal, whatever must divide still divides, and
a head becomes smaller by the ratio. Depth, experts, vocabulary and image size are cut by tables of key names below.

A configuration is rebuilt from its constructor with overrides only, so that values derived there (layer types, rotary
tables, total depths) are derived anew.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAYERS = re.compile(
    r"(num_|n_)?(\w+_)?(layers?|depth|num_layers_per_stack)(_num|_per_block)?|n_layer|(encoder|decoder)_num_layers|"
    r"num_(dense_|encoder_|decoder_)?blocks"
)
NOT_LAYERS = re.compile(
    r"vision_feature_layer|feature_layer|conditional_layer|num_feat_extract_layers|max_depth|min_depth|encode_proj_layers|"
    r".*_every_n_layers|num_kv_shared_layers|max_window_layers|num_nextn_predict_layers|iou_head_depth|.*num_lstm_layers|"
    r"num_residual_layers|look_.*|no_rope_layers?|n_layers_per_attn.*|num_dense_layers|spatial_vision_layer|"
    r"num_encoder_blocks|num_adapter_layers|use_.*|speech_decoder_postnet_layers"
)
DEPTHS = {"depths", "stage_num_blocks", "num_block_repeats", "blocks_per_stage", "block_sizes", "layers_per_stage"}
"""Lists of depths, one a stage: cut to one block each, two for the first, so that one stage has a repeated block."""
INDEX_LISTS = re.compile(
    r"_?out_indices|backbone_out_indices|out_index|.*_(indexes|indices)|extract_layers|intermediate_hook_ids|vision_feature_layers?|"
    r"cross_attention_layers|target_layer_ids|spatial_target_layers"
)
"""Lists of layer numbers; the depth is kept as large as the list is long, and the list is renumbered."""

WIDTHS = re.compile(
    r"\w*(hidden|embed|embedding|embeds|intermediate|inner|ffn|feedforward|d_model|d_ff|d_kv|dim|dims|width|widths|n_embd|"
    r"n_inner|rank|head_size|channels?|filters|proj_size|project|projection|units|latent|feature_size|bottleneck|lru_width|"
    r"adapter|output_size|num_pos_feats|state_size)\w*|d_\w+|entity_emb_size|upsample_groups|query_pre_attn_scalar|"
    r"backbone_channel_list|factor_size"
)
NOT_WIDTHS = re.compile(
    r".*(num_channels|image|patch_size|kernel|stride|vocab|num_embeddings|position_embeddings|pos_embeddings|"
    r"(?<!upsample)_groups|layers?$|heads|max_|num_position|tokens|window|dilation|codebook_size|num_hidden|ratio|"
    r"multiplier|expand|expansion|factor|frequency|topk|top_k|rope_feat|positions|in_channels$|input_channels|"
    r"audio_channels|embedding_length|chunk|buckets|mask_time|mask_feature|num_mel|mel_dim|mel_bins|n_mels|temperature|"
    r"act_dim|state_dim|xpath|per_second|query_dim|spec_size|visual_pos_dim|_id$|_ids$|_index$|indices|indexes|depth|"
    r"num_blocks|d_conv|capacity|seq_length|seq_len|dropout|num_stages|num_labels|num_attention|pixel|background_size|"
    r"feat_strides|dim_bbox$).*"
)
EXPERTS = re.compile(r"(n_routed|num_local|moe_num|num|n)_experts|moe_num_primary_experts|num_moe_experts")
EXPERTS_USED = re.compile(
    r"(num_)?experts_per_(tok|token)|moe_topk|moe_k|moe_top_k|num_selected_experts|moe_router_topk|ffn_moe_top_k|"
    r"top_k_experts"
)
EXPERT_GROUPS = {"n_group", "topk_group", "num_expert_group"}
DENSE_LAYERS = {"first_k_dense_replace"}
"""How many layers come before those with experts: one less than there are, or there were none with experts."""
VOCABULARIES = re.compile(r"(\w+_)?vocab_size|num_embeds|ngram_vocab_size_base|encoder_hash_byte_group_vocab")
NOT_VOCABULARIES = re.compile(r"type_vocab_size|audio_vocab_size|codebook_vocab_size|vocab_size_per_layer_input")
TOKEN_IDS = re.compile(r"\w*token_(id|ids|index)|\w*_(start|end|pad|bos|eos|image|video|audio)_id|unk_index")
CHOSEN = {"model_args"}
"""Dictionaries that no constructor can derive."""
MROPE_SECTION = [3, 3, 2]
"""How a head's rotated part is shared by time, rows and columns where the configuration leaves it to the model."""
IMAGE_SIZES = {"image_size", "img_size"}


NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Level:
    """How much to shrink: ``ratio`` divides widths, ``depth``/``vocabulary``/``images`` switch the other tables on."""

    ratio: int
    depth: bool
    vocabulary: bool
    images: bool

    def __str__(self) -> str:
        parts = [f"widths/{self.ratio}"] if self.ratio > 1 else []
        parts += [k for k in ("depth", "vocabulary", "images") if getattr(self, k)]
        return ", ".join(parts) or "none"


LEVELS = (
    Level(8, True, True, True),
    Level(4, True, True, True),
    Level(8, True, True, False),
    Level(1, True, True, False),
    Level(4, True, True, False),
    Level(8, True, False, False),
    Level(2, True, True, False),
    Level(8, False, False, False),
    Level(1, True, False, False),
    Level(1, False, True, False),
    Level(1, False, False, False),
)
"""Tried in this order until one builds; the last is the default configuration."""


def shrink(config: Any, level: Level, required: Mapping[str, Any] = NOTHING) -> Any:
    """A smaller configuration of the same class.

    Args:
        config: a ``transformers.PretrainedConfig``.
        level: one of :data:`LEVELS`.
        required: what the constructor must be given, though the default is None; parts are dictionaries of the same.

    Raises:
        Exception: what the configuration's own checks raise when the smaller values do not fit together.
    """
    if level == LEVELS[-1]:
        return copy.deepcopy(config)
    tree = _tree(config)
    depth = 2
    if level.depth:
        lists = [len(set(v)) for c in tree for k, v in _values(c) if INDEX_LISTS.fullmatch(k) and _is_list(v)]
        depth = min(max([2, *lists]), 4)
    return _rebuild(config, level, depth, _token_map(tree) if level.vocabulary else None, required)


@dataclass(frozen=True)
class _Tokens:
    ids: dict[int, int]
    size: int


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(v) is int for v in value)


def _values(config: Any) -> list[tuple[str, Any]]:
    return list(vars(config).items())


def _tree(config: Any) -> list[Any]:
    found = [config]
    for _, value in _values(config):
        if _is_config(value):
            found += _tree(value)
    return found


def _token_map(tree: list[Any]) -> _Tokens:
    """New numbers for special tokens: small ones keep theirs, large ones follow from 101 on."""
    large: set[int] = set()
    for config in tree:
        for key, value in _values(config):
            if TOKEN_IDS.fullmatch(key):
                numbers = value if isinstance(value, (list, tuple)) else [value]
                large |= {v for v in numbers if type(v) is int and v > 100}
    ids = {old: 101 + i for i, old in enumerate(sorted(large))}
    return _Tokens(ids, 160 if len(ids) < 50 else 320)


def _rebuild(
    config: Any, level: Level, depth: int, tokens: _Tokens | None, required: Mapping[str, Any] = NOTHING
) -> Any:
    fields = {f.name: f for f in dataclasses.fields(config)}
    overrides: dict[str, Any] = {}
    strange = _strange(config)
    for key, value in _values(config):
        if _is_config(value):
            overrides[key] = _rebuild(value, level, depth, tokens, required.get(key, NOTHING))
            continue
        if key == "_out_indices" and _is_list(value) and DEPTHS & vars(config).keys():  # stages, which are all kept
            overrides["out_indices"] = value
            continue
        small = _small(key, value, config, level, depth, tokens)
        if small is not None and small != value:
            overrides[key.removeprefix("_") if key == "_out_indices" else key] = small
        elif key in fields and not _is_default(fields[key], value) and _is_plain(value):
            # A value that the parent configuration chose for this part.
            overrides[key] = value
        elif key in required or key in CHOSEN or (key not in fields and key in strange):
            overrides[key] = value
    if "out_indices" in overrides:
        overrides["out_features"] = None
    _mend(config, overrides, level)
    before = getattr(config, "rope_parameters", None)
    if isinstance(before, dict) and before.get("mrope_section"):  # some types look at them while they are built
        half = sum(before["mrope_section"]) // level.ratio
        overrides["rope_parameters"] = {**before, "mrope_section": _sections(before["mrope_section"], half)}
    small = type(config)(**overrides)
    rope = _sectioned(config, small)
    return small if rope is None else type(config)(**{**overrides, "rope_parameters": rope})


def _strange(config: Any) -> set[str]:
    """Attributes that the class does not have by itself: the configuration around this one passed them."""
    with contextlib.suppress(Exception):  # a class that demands arguments
        known = vars(type(config)())
        return {key for key, value in _values(config) if not key.startswith("_") and key not in known}
    return set()


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, (list, tuple)) and len(value) <= 4)


def _is_default(field: Any, value: Any) -> bool:
    if field.default is None or field.name in ("out_features", "_out_features", "stage_names"):
        return True  # derived by the constructor: let it derive again
    return bool(field.default == value) or field.default is dataclasses.MISSING


def _small(key: str, value: Any, config: Any, level: Level, depth: int, tokens: _Tokens | None) -> Any:
    """The smaller value for one key, or None to leave it."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, float, dict)):
        return None
    if level.depth:
        if type(value) is int and LAYERS.fullmatch(key) and not NOT_LAYERS.fullmatch(key):
            return min(value, depth)
        if key in DENSE_LAYERS and type(value) is int:
            return min(value, depth - 1)
        if key in DEPTHS and _is_list(value):
            return type(value)(min(v, 2 if i == 0 else 1) for i, v in enumerate(value))
        if key == "depth" and _is_list(value):  # cvt: a stage needs more blocks than its number
            return type(value)(min(v, i + 1) for i, v in enumerate(value))
        if INDEX_LISTS.fullmatch(key) and _is_list(value) and not DEPTHS & vars(config).keys() and min(value) >= 0:
            return _renumbered(value, depth)
    if level.vocabulary and tokens is not None:
        if TOKEN_IDS.fullmatch(key):
            if type(value) is int:
                return tokens.ids.get(value)
            if _is_list(value):
                return type(value)(tokens.ids.get(v, v) for v in value)
        if type(value) is int and VOCABULARIES.fullmatch(key) and not NOT_VOCABULARIES.fullmatch(key):
            return min(value, tokens.size)
    if level.ratio > 1 or level.depth:
        if type(value) is int and EXPERTS.fullmatch(key):
            return min(value, 4)
        if type(value) is int and EXPERTS_USED.fullmatch(key):
            return min(value, 2)
        if key in EXPERT_GROUPS and type(value) is int:
            return min(value, 1)
    if level.images and key in IMAGE_SIZES:
        return _image(value, getattr(config, "patch_size", None))
    if level.ratio > 1 and WIDTHS.fullmatch(key) and (_is_stages(key, value) or not NOT_WIDTHS.fullmatch(key)):
        return _divided(value, level.ratio)
    return None


def _is_stages(key: str, value: Any) -> bool:
    """Whether these are the input channels of a network's stages: what the stage before has as its output channels."""
    return key.endswith("_in_channels") and _is_list(value)


def _renumbered(value: Any, depth: int) -> Any:
    """Layer numbers within a stack of ``depth``: as many distinct ones as fit, in the order given."""
    order = sorted(set(value))
    start = 1 if min(value) > 0 and len(order) < depth else 0
    return type(value)(min(start + order.index(v), depth - 1) for v in value)


def _divided(value: Any, ratio: int) -> Any:
    if type(value) is int:
        return value // ratio if value >= 32 and value % ratio == 0 else None
    if isinstance(value, (list, tuple)) and value:
        parts = [_divided(v, ratio) for v in value]
        return type(value)(v if p is None else p for v, p in zip(value, parts, strict=True))
    return None


def _image(value: Any, patch: Any) -> Any:
    """Four patches a side for plain patches; 64 pixels where a hierarchy halves the resolution again and again."""
    patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
    side = patch * 4 if isinstance(patch, int) and patch >= 7 else 64
    if type(value) is int:
        return min(value, side)
    if _is_list(value):
        return type(value)(min(v, side) for v in value)
    return None


def _mend(config: Any, overrides: dict[str, Any], level: Level) -> None:
    """What follows from the shrunken values and is not derived by constructors."""
    kinds = getattr(config, "attention_types", None)
    if level.depth and kinds and "num_layers" in overrides:  # gpt_neo: [[["global", "local"], 12]]
        overrides["attention_types"] = [[kinds[0][0], 1]]
    if level.depth and getattr(config, "merge_index", None):  # seggpt: before the first layer whose output is used
        overrides["merge_index"] = 0
    text: Any = overrides.get("text_config")
    vision: Any = overrides.get("vision_config")
    if hasattr(text, "hidden_size") and hasattr(vision, "out_hidden_size"):  # defaults of some types do not fit
        vision.out_hidden_size = text.hidden_size


def _sectioned(config: Any, small: Any) -> dict[str, Any] | None:
    """Rotary parameters whose sections (of time, rows, columns) fill half of a head's rotated part; None if none."""
    before, heads = getattr(config, "rope_parameters", None), getattr(small, "num_attention_heads", None)
    if not isinstance(before, dict) or not isinstance(heads, int):
        return None
    section = before.get("mrope_section")
    if section is None and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        section = MROPE_SECTION  # the model has its own default, which is for one width only
    if section is None:
        return None
    rotated = getattr(small, "qk_rope_head_dim", None)
    if not isinstance(rotated, int):
        head = getattr(small, "head_dim", None) or small.hidden_size // heads
        rotated = int(head * before.get("partial_rotary_factor", 1.0))
    return {**before, "mrope_section": _sections(section, rotated // 2)}


def _sections(section: list[int], half: int) -> list[int]:
    """Sections in about the same proportion that fill ``half``."""
    parts = [max(part * half // sum(section), 1) for part in section[1:]]
    return [half - sum(parts), *parts]
