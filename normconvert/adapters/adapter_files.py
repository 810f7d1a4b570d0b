"""What an adapter's folder holds: its config, and its tensors by the module of the model that they belong to.

The files are those that PEFT's ``save_pretrained`` writes: ``adapter_config.json`` and ``adapter_model.safetensors``.
What is not known here is refused: a setting that this file has never heard of may change what an adapter computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from normconvert.errors import InputError
from normconvert.files.tensor_info import COUNTER, check_name
from normconvert.files.weight_files import load_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROMPT_KEY = "prompt_embeddings"
LORA, PREFIX_TUNING = "LORA", "PREFIX_TUNING"
PROMPTS = frozenset({"PROMPT_TUNING", "P_TUNING"})
KINDS = (LORA, *sorted(PROMPTS), PREFIX_TUNING)

# Settings that say where an adapter is put, how it is trained or how it begins: none changes the function of the
# tensors, but those that `scaling` and `Adapter` read. Any other must be off.
_GENERAL = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
})  # fmt: skip
_LORA = frozenset({
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_dora", "lora_bias",
    # Read only together with another setting, which must be off.
    "megatron_core", "qalora_group_size",
})  # fmt: skip
_PROMPT = frozenset({
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    "prefix_projection", "init_weights",
})  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the model's own weights alone."""

MOST_REPEATS = 3
"""Repetitions in a pattern; of more, or of groups that are repeated, Python tries all ways there are, which may be for
ever."""
_REPEATS, _REPEATED_GROUP = re.compile(r"(?<!\\)[*+{]"), re.compile(r"(?<!\\)\)[*+{]")
_FACTORS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "bias", "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


class _Config(BaseModel):
    """An adapter's config, as far as it is computed with."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    peft_type: str
    lora_alpha: float = 8
    use_rslora: bool | None = None
    use_dora: bool | None = None
    alpha_pattern: dict[str, float] | None = None

    @field_validator("alpha_pattern")
    @classmethod
    def _regular(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or {}:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern[:40]!r} is no regular expression ({error})") from error
            if _REPEATED_GROUP.search(pattern) or len(_REPEATS.findall(pattern)) > MOST_REPEATS:
                raise ValueError(f"{pattern[:40]!r} repeats more than a name needs: write out the names")
        return patterns


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to the weight of one module: ``scaling * B A``, in the layout of that weight.

    Attributes:
        path: of the module.
        a: (rank, inputs), or (rank, inputs, kernel...) of a convolution.
        b: (outputs, rank), or (outputs, rank, 1...) of a convolution.
        scaling: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        embedding: the module is a table: B is (width, rank), A (rank, rows).
        bias: (outputs,), added to the module's result times ``scaling``; None if there is none.
        magnitude: (outputs,), the lengths of the rows of W + scaling B A (DoRA, arXiv 2402.09353); None: plain LoRA.
        keys: field -> the name in the file.
    """

    path: str
    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter as data.

    Attributes:
        folder: where it was read.
        config: adapter_config.json.
        low_rank: module path -> what is added to its weight.
        saved: model tensor name -> whole tensor that takes the place of the model's own.
        saved_keys: model tensor name -> name in the file.
        prompt: (tokens, width) of virtual tokens, or (tokens, layers * 2 * width) of a prefix; None for LoRA.
    """

    folder: Path
    config: dict[str, Any]
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    saved_keys: dict[str, str] = field(default_factory=dict)
    prompt: Tensor | None = None

    @property
    def kind(self) -> str:
        """PEFT's name for it."""
        return str(self.config["peft_type"])

    @property
    def base(self) -> str:
        """The checkpoint that it says it was trained on."""
        return str(self.config.get("base_model_name_or_path"))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their name in the file."""
        found = {self.saved_keys[name]: value for name, value in self.saved.items()}
        for one in self.low_rank.values():
            found |= {key: getattr(one, name) for name, key in one.keys.items()}
        if self.prompt is not None:
            found[PROMPT_KEY] = self.prompt
        return found


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
        InputError: it is none, of a kind or with a setting that is not known here, or a tensor is NaN or infinite.
    """
    config = _read_config(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise InputError(f"{folder}: no {WEIGHTS_FILE}: save the adapter with safe_serialization=True")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    for name, value in tensors.items():
        check_name(file, name)
        if value.dtype not in FLOATS and not name.endswith(COUNTER):
            raise InputError(f"{file}: tensor {name} is {str(value.dtype).removeprefix('torch.')}, expected floats")
        if not bool(value.isfinite().all()):
            raise InputError(f"{file}: tensor {name} holds NaN or infinite values: is it one of a run that diverged?")
    adapter = Adapter(folder, config)
    if config["peft_type"] != LORA:
        if set(tensors) != {PROMPT_KEY} or tensors[PROMPT_KEY].ndim != 2:
            raise InputError(f"{file}: expected one matrix {PROMPT_KEY}, found {', '.join(sorted(tensors))}")
        return replace(adapter, prompt=tensors[PROMPT_KEY])
    return _name_tensors(adapter, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{folder}: not a PEFT adapter: expected a folder with {CONFIG_FILE}")
    config = load_json(file)
    try:
        kind = _Config.model_validate(config).peft_type
    except (ValidationError, RecursionError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "deep"}
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: not the config of a PEFT adapter ({place}: {first['msg']})") from error
    if kind not in KINDS:
        raise InputError(f"{file}: peft_type {kind}: expected one of {', '.join(KINDS)}")
    known = _GENERAL | (_LORA if kind == LORA else _PROMPT)
    strange = sorted(name for name, value in config.items() if name not in known and value)
    if strange:
        raise InputError(
            f"{file}: sets {', '.join(strange)}, and what that does to a converted model is not known: "
            "merge the adapter into the original and convert the result"
        )
    start = config.get("init_lora_weights", True)
    if kind == LORA and start not in _PLAIN_STARTS:
        raise InputError(
            f"{file}: init_lora_weights {start!r} changes the model's own weights: save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if kind != LORA and config.get("num_transformer_submodules") not in (None, 1):
        raise InputError(f"{file}: prompts of both an encoder and a decoder are not supported: expected one submodule")
    return config


def _name_tensors(adapter: Adapter, tensors: dict[str, Tensor]) -> Adapter:
    """Sort the tensors of a LoRA by module."""
    parts: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    saved: dict[str, Tensor] = {}
    saved_keys: dict[str, str] = {}
    file = adapter.folder / WEIGHTS_FILE
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise InputError(f"{file}: tensor {key}: expected a name that begins with {PREFIX}")
        # An adapter's own name stands inside the key where it was not taken out on saving.
        name = key.removeprefix(PREFIX).replace(".default.", ".").removesuffix(".default")
        found = next((suffix for suffix in _FACTORS if name.endswith(f".{suffix}")), None)
        if found is None and "lora_" in name:
            raise InputError(f"{file}: tensor {key} is no part of LoRA or DoRA that is known here")
        if found is None:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            saved[name], saved_keys[name] = value, key
            continue
        path = name.removesuffix(f".{found}")
        parts.setdefault(path, {})[_FACTORS[found]] = value
        keys.setdefault(path, {})[_FACTORS[found]] = key
    low_rank = {}
    for path, held in parts.items():
        if not {"a", "b"} <= set(held):
            raise InputError(f"{file}: {path} holds {', '.join(keys[path].values())}: expected both factors of LoRA")
        if bool(adapter.config.get("use_dora")) != ("magnitude" in held):
            raise InputError(f"{file}: {path}: use_dora and the tensors of the module do not agree")
        if held["a"].ndim < 2 or 0 in held["a"].shape:
            shape = list(held["a"].shape)
            raise InputError(f"{file}: {keys[path]['a']} is {shape}, expected (rank, inputs): not a factor of LoRA")
        table = "lora_embedding" in keys[path]["a"]
        scale = scaling(adapter.config, path, held["a"].shape[0])
        low_rank[path] = LowRank(path, scaling=scale, embedding=table, keys=keys[path], **held)
    if not low_rank and not saved:
        raise InputError(f"{file}: holds no tensor")
    return replace(adapter, low_rank=low_rank, saved=saved, saved_keys=saved_keys)


def scaling(config: dict[str, Any], path: str, rank: int) -> float:
    """alpha / rank of one module, as PEFT finds it: patterns are regular expressions on the end of the path."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config.get("lora_alpha", 8)
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def stored(value: Tensor, before: Tensor) -> Tensor:
    """An edited tensor as it is stored: in its dtype before, but in float32 if that was narrower.

    PEFT computes with adapters in float32, so a narrower one would be rounded where the original's was not.
    """
    wide = before.dtype if torch.finfo(before.dtype).bits >= 32 else torch.float32
    return value.to(wide).contiguous()
