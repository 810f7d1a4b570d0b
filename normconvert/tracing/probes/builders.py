"""The table: input name -> what to feed it.

Nothing here knows a model; a row knows what an argument of that name means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from normconvert.tracing.probes.facts import Facts, Sizes
from normconvert.tracing.probes.specs import Spec

Builder = Callable[[Facts, Sizes], Any]

PLACEHOLDERS = {
    "pixel_values": ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_pad_token_id"),
    "pixel_values_videos": ("video_token_id", "video_token_index"),
    "input_features": ("audio_token_id", "audio_token_index"),
    "input_values": ("audio_token_id", "audio_token_index"),
}
"""Signal argument -> the config attributes that name its placeholder token among the text."""

TOKEN_TYPES = {"pixel_values": 1, "pixel_values_videos": 2, "input_features": 3, "input_values": 3}
"""Signal argument -> its number in ``mm_token_type_ids``; text is 0."""

CLASSES = 2
"""Names of things to find in every image, for models that are told them."""


def ids(length: int = 0, rows: int = 0) -> Builder:
    """Token ids, (batch, length); 0 takes the sizes' own."""

    def build(facts: Facts, sizes: Sizes) -> Spec:
        low = min(3, facts.vocabulary - 1)  # the first ids are often padding and the ends of a text
        shape: tuple[int, ...] = (rows or sizes.batch, length or sizes.length)
        books = facts.number("num_codebooks")
        if books > 1 and sizes.layout in (1, 2):  # one id a codebook, with or without one for the text
            shape = (*shape, books + 2 - sizes.layout)
        return Spec(shape, "ids", low, facts.vocabulary)

    return build


def like_text(kind: str, high: int = 2) -> Builder:
    """A (batch, length) companion of the token ids."""
    return lambda facts, sizes: Spec((sizes.batch, sizes.length), kind, 0, high)


def decoder_ids(facts: Facts, sizes: Sizes) -> Spec:
    """Fewer tokens than the encoder's, so that the two lengths are told apart."""
    low = min(3, facts.vocabulary - 1)
    length = max(sizes.length - 2, 1)
    books = facts.number("num_codebooks", part="decoder", default=1)
    vocabulary = facts.number("vocab_size", part="decoder", default=facts.vocabulary)
    if books > 1:
        shape: tuple[int, ...] = (
            (sizes.batch * books, length) if sizes.layout % 2 == 0 else (sizes.batch, length, books)
        )
    else:
        shape = (sizes.batch, length)
    return Spec(shape, "ids", low, min(vocabulary, facts.vocabulary) if books == 1 else vocabulary)


def image(facts: Facts, sizes: Sizes) -> Spec:
    """(batch, channels, height, width), or with a frames axis for video models."""
    if "image_grid_thw" in facts.parameters or "grid_thw" in facts.parameters:
        return patches(facts, sizes)
    if "spatial_shapes" in facts.parameters:  # flat patches of each image beside each other, padded to one number
        width = facts.channels * facts.number("patch_size", part="vision", default=16) ** 2
        return Spec((sizes.batch, grid_side(facts) ** 2, width), "image")
    if "target_sizes" in facts.parameters:  # patches of all images in one row
        patch = facts.number("patch_size", part="vision", default=14)
        return Spec((1, facts.channels, patch, patch * sizes.batch * grid_side(facts) ** 2), "image")
    side = (sizes.image, sizes.image) if sizes.image else facts.image_size or (64, 64)
    if "prompt_pixel_values" in facts.parameters:  # the model puts prompt and image below each other
        side = (side[0] // 2, side[1])
    frames = facts.number("num_frames", "frames_per_clip", part="vision")
    channels = facts.channels
    if sizes.layout == 1 or (sizes.layout == 0 and pinpoint(facts)):  # several crops of an image, or several images
        return Spec((sizes.batch, crops(facts, side), channels, *side), "image")
    if frames or sizes.layout == 2:
        return Spec((sizes.batch, sizes.frames or frames or 4, channels, *side), "image")
    if sizes.layout == 3:  # its patches, each of them flat
        width = channels * facts.number("patch_size", part="vision", default=16) ** 2
        return Spec((sizes.batch, grid_side(facts) ** 2, width), "image")
    return Spec((sizes.batch, channels, *side), "image")


def pinpoint(facts: Facts) -> tuple[int, int] | None:
    """(height, width) of the smallest picture among those that the model is told to cut into crops, if it does."""
    points = facts.get("image_grid_pinpoints")
    return min(((int(h), int(w)) for h, w in points), key=math.prod) if points else None


def crops(facts: Facts, side: tuple[int, int]) -> int:
    """Crops of a picture: the whole of it made small, and its parts."""
    whole = pinpoint(facts)
    return 1 + math.ceil(whole[0] / side[0]) * math.ceil(whole[1] / side[1]) if whole else 2


def picture_sizes(facts: Facts, sizes: Sizes) -> Spec:
    """(images, 2): height and width of each picture before it was cut into crops."""
    whole = pinpoint(facts) or image(facts, sizes).shape[-2:]
    return Spec((sizes.batch, 2), "given", value=[list(whole)] * sizes.batch)


def patch_mask(facts: Facts, sizes: Sizes) -> Spec:
    """Which crops of an image, or which of its patches, are not padding: (batch, crops or patches)."""
    pixels = image(facts, sizes).shape
    if len(pixels) == 5:
        return Spec(pixels[:2], "true")
    return Spec((sizes.batch, pixels[1] if len(pixels) == 3 else patch_count(facts)), "ones")


def video(facts: Facts, sizes: Sizes) -> Spec:
    """(batch, frames, channels, height, width), or packed patches."""
    if "video_grid_thw" in facts.parameters:
        return patches(facts, sizes)
    side = (sizes.image, sizes.image) if sizes.image else facts.image_size or (64, 64)
    frames = sizes.frames or facts.number("num_frames", "frames_per_clip", part="vision", default=4)
    return Spec((sizes.batch, frames, facts.channels, *side), "image")


def grid_side(facts: Facts) -> int:
    """Patches along an image's side: two merged windows."""
    return 2 * max(facts.number("spatial_merge_size", "merge_size", part="vision", default=2), 2)


def patches(facts: Facts, sizes: Sizes) -> Spec:
    """(images * patches, channels * frames * side * side): images packed as flat patches."""
    side = facts.number("patch_size", part="vision", default=14)
    frames = facts.number("temporal_patch_size", part="vision", default=1)
    conv = facts.first(nn.Conv3d) or facts.first(nn.Conv2d)
    if conv is not None and conv.kernel_size[-1] != side:  # a later one; what cuts the image is linear
        conv = None
    channels = conv.in_channels if conv is not None else facts.channels
    first = facts.first(nn.Linear)
    if conv is None and first is not None and first.in_features % (channels * side * side) == 0:
        frames = first.in_features // (channels * side * side)
    count = grid_side(facts) ** 2
    if sizes.layout == 1:  # images beside each other instead of one after the other
        return Spec((sizes.batch, count, channels * frames * side * side), "image")
    if sizes.layout == 2:  # patches as small images
        return Spec((sizes.batch * count, channels, side, side), "image")
    if sizes.layout == 3:  # windows of patches that the model merges, as small images with the channels last
        side *= facts.number("spatial_merge_size", "merge_size", part="vision", default=1)
        return Spec((sizes.batch * count, side, side, channels), "image")
    return Spec((sizes.batch * count, channels * frames * side * side), "image")


def grid(facts: Facts, sizes: Sizes) -> Spec:
    """(images, 3): frames, rows and columns of patches of every packed image."""
    side = grid_side(facts)
    return Spec((sizes.batch, 3), "given", value=[[1, side, side]] * sizes.batch)


def merges(facts: Facts, sizes: Sizes) -> Spec:
    """(images,): how many patches along a side become one."""
    return Spec((sizes.batch,), "given", value=[grid_side(facts) // 2] * sizes.batch)


SPECTRUM_SIZES = (
    *("num_mel_bins", "n_mels", "num_mels", "feature_size", "mel_bins", "input_feat_per_channel", "feat_in"),
    *("feature_projection_input_dim", "num_mel_channels", "mel_dim", "input_dim", "input_feat_size"),
)
"""Config attributes that may say how many features a spectrogram frame has."""


def mels(facts: Facts) -> int:
    """Features of one spectrogram frame."""
    return facts.number(*SPECTRUM_SIZES, part="audio", default=80)


def features(facts: Facts, sizes: Sizes) -> Spec:
    """A spectrogram: (batch, mels, frames) if a convolution over time comes first, else (batch, frames, mels)."""
    bins = mels(facts)
    first = facts.first(nn.Linear)
    if sizes.layout == 3 and first is not None:  # several spectrogram frames stacked into one
        return Spec((sizes.batch, sizes.frames or 64, first.in_features), "audio")
    frames = sizes.frames or 64
    if window := 2 * facts.number("n_window", part="audio"):  # an encoder that reads the frames in windows
        frames = math.ceil(frames / window) * window
    positions = facts.number("max_source_positions", part="audio")
    conv = facts.first(nn.Conv1d)
    over_time = conv is not None and conv.in_channels == bins
    if over_time != (sizes.layout % 2 == 1):
        return Spec((sizes.batch, bins, frames if window else sizes.frames or (2 * positions or 64)), "audio")
    if "input_values" in facts.required:  # the same sound twice: as many frames as the samples hold
        frames = sizes.samples // facts.number("hop_length", part="audio", default=320)
    if sizes.layout >= 2:
        return Spec((sizes.batch, 1, 1024 if sizes.layout == 2 else frames, bins), "audio")
    return Spec((sizes.batch, frames, bins), "audio")


def waveform(facts: Facts, sizes: Sizes) -> Spec:
    """Raw audio (batch, samples), with a channel axis for codecs, or a spectrogram of fixed length."""
    length, bins = facts.number("max_length", part="audio"), facts.number("num_mel_bins", part="audio")
    if bins and sizes.layout == 0:
        return Spec((sizes.batch, length if length > 20 else 64, bins), "audio")
    codec = facts.number("audio_channels") or "input_features" in facts.required
    if sizes.layout == 1 or (codec and sizes.layout == 0):
        return Spec((sizes.batch, facts.number("audio_channels", default=1), sizes.samples), "audio")
    return Spec((sizes.batch, sizes.samples), "audio")


def history(facts: Facts) -> int:
    """Time steps that a time series model looks back on."""
    context = facts.number("context_length", "context_len", default=32)
    lags = facts.get("lags_sequence", default=None)
    return context + (max(lags) if lags else 0)


def series(facts: Facts, sizes: Sizes) -> Spec:
    """Past values (batch, time) or (batch, time, channels)."""
    width = facts.number("num_input_channels", "input_size", default=1)
    three = facts.number("num_input_channels") or width > 1
    shape = (
        (sizes.batch, history(facts), width) if bool(three) != (sizes.layout == 1) else (sizes.batch, history(facts))
    )
    return Spec(shape, "float")


def time_features(steps: Callable[[Facts], int]) -> Builder:
    """(batch, time, features), of width zero where the model counts no features of time."""
    return lambda f, s: Spec((s.batch, steps(f), f.number("num_time_features")), "float")


def static(count: str, kind: str) -> Builder:
    """(batch, features) that do not change over time; left out where the config counts none."""

    def build(facts: Facts, sizes: Sizes) -> Spec | None:
        return Spec((sizes.batch, facts.number(count)), kind, 0, 1) if facts.number(count) else None

    return build


def horizon(facts: Facts) -> int:
    """Time steps to predict."""
    return facts.number("prediction_length", "horizon_length", default=4)


def boxes(facts: Facts, sizes: Sizes) -> Spec:
    """Word boxes on a page, integers below 1000, or floats where the model projects them."""
    if facts.number("dim_bbox"):
        return Spec((sizes.batch, sizes.length, facts.number("dim_bbox")), "positive")
    return Spec((sizes.batch, sizes.length, 4), "boxes", 0, 500)


def width(*names: str, default: int = 32) -> Callable[[Facts], int]:
    """A size read from the config."""
    return lambda facts: facts.number(*names, default=default)


def hidden(size: Callable[[Facts], int], kind: str = "float") -> Builder:
    """(batch, length, size)."""
    return lambda f, s: Spec((s.batch, s.length, size(f)), kind)


def packed_or_hidden(facts: Facts, sizes: Sizes) -> Spec:
    """``hidden_states`` as a model's own input: packed patches beside a grid, else (batch, length, width)."""
    if "grid_thw" in facts.parameters:
        return patches(facts, sizes)
    return Spec((sizes.batch, sizes.length, facts.number("hidden_size", "d_model")), "float")


def flattened(facts: Facts, sizes: Sizes) -> Spec:
    """(batch, patches, 2 + values): row and column of the patch come first, so values stay in [0, 1)."""
    values = (
        facts.number("patch_embed_hidden_size", part="vision")
        or facts.channels * facts.number("patch_size", default=16) ** 2
    )
    return Spec((sizes.batch, 9, 2 + values), "positive")


def latents(facts: Facts) -> int:
    """Places among the text that an image's features take, whatever token stands there."""
    return facts.number("latent_query_num")


def patch_count(facts: Facts) -> int:
    """Patches of an image."""
    height, across = facts.image_size or (64, 64)
    side = facts.number("patch_size", part="vision", default=16) or 1
    return (height // side) * (across // side)


def _time(spec: Spec, facts: Facts) -> int:
    """The length of a spectrogram's time axis."""
    return next((n for n in spec.shape[1:] if n != mels(facts)), mels(facts))


def heard(facts: Facts, sizes: Sizes) -> Spec:
    """Which of the vectors that a sound becomes are masked: (batch, vectors)."""
    kernels, strides = (facts.get(name, part="audio", default=()) for name in ("conv_kernel", "conv_stride"))
    count = sizes.samples if kernels else _time(features(facts, sizes), facts)
    for kernel, stride in zip(kernels, strides, strict=False):
        count = (count - kernel) // stride + 1
    return Spec((sizes.batch, count), "false")


# Arguments that carry the model's real input. A row may return a Spec or a plain value.
BUILDERS: dict[str, Builder] = {
    "input_ids": ids(),
    "decoder_input_ids": decoder_ids,
    "inputs_embeds": hidden(width("hidden_size", "d_model", "n_embd")),
    "hidden_states": packed_or_hidden,
    "qformer_input_ids": ids(),
    "ple_input_ids": ids(),
    "protein_input_ids": ids(),
    "classes_input_ids": lambda f, s: ids(rows=CLASSES * s.batch)(f, s),
    "classes_attention_mask": lambda f, s: Spec((CLASSES * s.batch, s.length), "ones"),
    "classes_structure": lambda f, s: Spec((s.batch,), "given", value=[CLASSES] * s.batch),
    "tasks_input_ids": ids(),
    "tasks_attention_mask": like_text("ones"),
    "task_inputs": lambda f, s: Spec((s.batch, f.number("task_seq_len", default=77)), "ids", 1, 100),
    "pixel_values": image,
    "image_pixel_values": image,
    "prompt_pixel_values": image,
    "high_res_pixel_values": lambda f, s: Spec((s.batch, 3, *[f.number("image_size", part="detail")] * 2), "image"),
    "image": image,
    "pixel_values_videos": video,
    "prompt_masks": image,
    "input_features": features,
    "audio_mel": features,
    "audio_mel_mask": lambda f, s: Spec((s.batch, s.frames or 64), "false"),
    "input_values": waveform,
    "image_grid_thw": grid,
    "video_grid_thw": grid,
    "grid_thw": grid,
    "past_values": series,
    "past_observed_mask": lambda f, s: Spec(series(f, s).shape, "true"),
    "past_time_features": time_features(history),
    "future_time_features": time_features(horizon),
    "future_values": lambda f, s: Spec((s.batch, horizon(f), *series(f, s).shape[2:]), "float"),
    "static_categorical_features": static("num_static_categorical_features", "int"),
    "static_real_features": static("num_static_real_features", "float"),
    "past_values_padding": lambda f, s: Spec((s.batch, history(f)), "zeros"),
    "freq": lambda f, s: Spec((s.batch, 1), "int", 0, 3),
    "bbox": boxes,
    "visual_feats": hidden(width("visual_feat_dim", default=2048)),
    "visual_pos": hidden(width("visual_pos_dim", default=4), "positive"),
    "query_embeds": hidden(width("hidden_size")),
    "noise_embeds": hidden(width("hidden_size")),
    "encoder_hidden_states": hidden(
        width("encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", "d_model")
    ),
    "latents": lambda f, s: Spec((s.batch, f.number("hidden_size", "codebook_dim"), 8), "float"),
    "flattened_patches": flattened,
    "states": hidden(width("state_dim")),
    "actions": hidden(width("act_dim")),
    "rewards": lambda f, s: Spec((s.batch, s.length, 1), "float"),
    "returns_to_go": lambda f, s: Spec((s.batch, s.length, 1), "float"),
    "timesteps": like_text("int", 10),
    "attention_mask": like_text("ones"),
    "token_type_ids": like_text("zeros"),
    "mm_token_type_ids": like_text("zeros"),
    "langs": like_text("zeros"),
    "input_features_mask": lambda f, s: Spec((s.batch, _time(features(f, s), f)), "ones"),
    "feature_attention_mask": lambda f, s: Spec((s.batch, features(f, s).shape[-1]), "ones"),
    "pixel_mask": lambda f, s: Spec((s.batch, *image(f, s).shape[-2:]), "ones"),
    "pixel_attention_mask": patch_mask,
    "bool_masked_pos": lambda f, s: Spec((s.batch, patch_count(f)), "false"),
    "mask_time_indices": heard,
    "is_longer": lambda f, s: Spec((s.batch, 1), "false"),
    "aspect_ratio_ids": lambda f, s: Spec((s.batch, 1), "ones"),
    "aspect_ratio_mask": lambda f, s: Spec((s.batch, 1, f.number("max_num_tiles", default=4)), "ones"),
    "image_embeds_position_mask": lambda f, s: Spec(
        (s.batch, s.length + latents(f)), "given", value=[[0, *[1] * latents(f), *[0] * (s.length - 1)]] * s.batch
    ),
    "image_sizes": picture_sizes,
    "spatial_shapes": lambda f, s: Spec((s.batch, 2), "given", value=[[grid_side(f)] * 2] * s.batch),
    "target_sizes": lambda f, s: Spec((s.batch, 2), "given", value=[[grid_side(f)] * 2] * s.batch),
    "state": lambda f, s: Spec((s.batch, f.number("max_state_dim", "state_dim")), "float"),
    "pixel_position_ids": lambda f, s: Spec((s.batch, 16, 2), "int", 0, 4),
    "image_attention_mask": lambda f, s: Spec((s.batch, s.length, 2), "ones"),
    "merge_sizes": merges,
    "image_merge_sizes": merges,
    "video_merge_sizes": merges,
    "x": image,
}


def inputs(facts: Facts, sizes: Sizes) -> Any:
    """``inputs``: what the encoder takes, where the model has one that says so; else token ids."""
    encoder = getattr(facts.model, "encoder", None)
    name = getattr(encoder, "main_input_name", None)
    build = BUILDERS.get(name) if isinstance(name, str) and name != "inputs" else None
    return build(facts, sizes) if build is not None else ids()(facts, sizes)


BUILDERS["inputs"] = inputs
