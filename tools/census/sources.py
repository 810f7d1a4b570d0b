"""The checkpoints that `tools.census.output_hashes` converts: the embedded models, and random ones of many designs.

A random checkpoint has the same bytes each time that it is made: its model is built and perturbed with fixed seeds.
The sizes are small and *distinct* (48 channels, 3 heads, vocabulary 101), so that a mistaken axis changes the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Arguments = dict[str, Any]
Save = Callable[["nn.Module", Arguments, Path], None]

LAYERNORM: dict[str, Arguments] = {
    "rmsnorm": {"method": "rmsnorm"},
    "rmsnorm fold": {"method": "rmsnorm", "fold": True},
    "rmsnorm bf16 shards": {"method": "rmsnorm", "dtype": "bfloat16", "max_shard_size": 60_000},
    "crmsnorm isometric": {"method": "crmsnorm", "basis": "isometric"},
    "crmsnorm paper": {"method": "crmsnorm", "basis": "paper"},
}
"""Column of the table -> arguments of `normconvert.convert`, for models with LayerNorms."""

BATCHNORM: dict[str, Arguments] = {
    "fuse-bn": {"method": "fuse-bn"},
    "fuse-bn merge": {"method": "fuse-bn", "merge_branches": True},
}
"""The same for models with BatchNorms."""

COLUMNS = {**LAYERNORM, **BATCHNORM}


@dataclass(frozen=True)
class Checkpoint:
    """One row of the table.

    Attributes:
        name: of the row, and of the folder that the checkpoint is written to.
        methods: columns that apply, with the arguments of the conversion.
        build: constructs the model with the library's own initialisation; None for an embedded model.
        save: writes it, from the model, the arguments that it was built with and the folder.
        arguments: those that it was built with.
    """

    name: str
    methods: dict[str, Arguments]
    build: Callable[[], nn.Module] | None = None
    save: Save | None = None
    arguments: Arguments | None = None

    @property
    def embedded(self) -> bool:
        """Whether it comes with the package, trained; such a model is verified as well."""
        return self.build is None

    def make(self, folder: Path) -> str:
        """Write the checkpoint below ``folder`` and return what `normconvert.convert` calls it."""
        if self.build is None or self.save is None:
            return self.name
        import torch

        from tests.support.perturb import perturb

        torch.manual_seed(0)
        model = perturb(self.build().eval())
        place = folder / self.name
        self.save(model, dict(self.arguments or {}), place)
        return str(place)


def _whole(model: Any, arguments: Arguments, folder: Path) -> None:
    model.save_pretrained(folder)


def _shards(model: Any, arguments: Arguments, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="60KB")


def _pickle(model: Any, arguments: Arguments, folder: Path) -> None:
    import torch

    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _timm(model: Any, arguments: Arguments, folder: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)


TOKENS: Arguments = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DEEP: Arguments = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
DECODER: Arguments = {**TOKENS, **DEEP, "intermediate_size": 80, "max_position_embeddings": 64}
GQA: Arguments = {**DECODER, "num_attention_heads": 6, "num_key_value_heads": 2}
OPT: Arguments = {**TOKENS, **DEEP, "word_embed_proj_dim": 48, "ffn_dim": 80, "max_position_embeddings": 64}
VISION: Arguments = {**DEEP, "intermediate_size": 80, "image_size": 32, "patch_size": 8, "num_labels": 5}
SEQ2SEQ: Arguments = {
    **TOKENS, "decoder_start_token_id": 2, "forced_eos_token_id": 2, "d_model": 48, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
}  # fmt: skip
WHISPER: Arguments = {
    **SEQ2SEQ, "num_mel_bins": 12, "max_source_positions": 16, "max_target_positions": 32, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
STAGES: Arguments = {
    "depths": [1, 2, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4],
    "sr_ratios": [4, 2, 1, 1], "image_size": 64, "num_labels": 5,
}  # fmt: skip
VIT: Arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN: Arguments = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4),
    "num_classes": 5,
}  # fmt: skip

TRANSFORMERS: tuple[tuple[str, str, Arguments, Save, dict[str, Arguments]], ...] = (
    ("opt-tied", "OPTForCausalLM", OPT, _whole, LAYERNORM),
    ("opt-post-norm", "OPTForCausalLM", {**OPT, "do_layer_norm_before": False}, _whole, LAYERNORM),  # all refused
    ("gpt-neox-separate-head", "GPTNeoXForCausalLM", DECODER, _whole, LAYERNORM),
    ("bloom-shards", "BloomForCausalLM", {**TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 3}, _shards, LAYERNORM),
    ("stablelm-pickle", "StableLmForCausalLM", GQA, _pickle, LAYERNORM),
    ("cohere-norm-by-hand", "CohereForCausalLM", GQA, _whole, LAYERNORM),
    ("olmo-norm-without-weight", "OlmoForCausalLM", GQA, _whole, LAYERNORM),
    ("phimoe-experts", "PhimoeForCausalLM", {**GQA, "num_local_experts": 4, "sliding_window": None}, _whole, LAYERNORM),
    ("whisper-encoder-decoder", "WhisperForConditionalGeneration", WHISPER, _whole, LAYERNORM),
    ("vit", "ViTForImageClassification", VISION, _whole, LAYERNORM),
    ("dinov2-layer-scale", "Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}, _whole, LAYERNORM),
    ("beit-relative-positions", "BeitForImageClassification", {**VISION, "layer_scale_init_value": 0.1,
     "use_relative_position_bias": True}, _whole, LAYERNORM),
    ("segformer-stages", "SegformerForSemanticSegmentation", {**STAGES, "decoder_hidden_size": 24}, _whole, COLUMNS),
)  # fmt: skip
"""Name, class of transformers, values of its configuration, form on disk, columns."""

TIMM: tuple[tuple[str, str, Arguments, dict[str, Arguments]], ...] = (
    ("timm-vit-layer-scale", "vit_tiny_patch16_224", {**VIT, "init_values": 0.3}, LAYERNORM),
    ("timm-swin-some-stay", "swin_tiny_patch4_window7_224", SWIN, LAYERNORM),
    ("timm-mobilevit-both-norms", "mobilevit_xxs", {"num_classes": 5}, COLUMNS),
    ("timm-resnet", "resnet18", {"channels": (8, 16, 24, 32), "num_classes": 5}, COLUMNS),  # no LayerNorm: refused
    ("timm-densenet", "densenet121", {"growth_rate": 8, "block_config": (2, 2, 2), "num_classes": 5}, BATCHNORM),
    ("timm-mobilenet", "mobilenetv3_small_050", {"num_classes": 5}, BATCHNORM),
    ("timm-repvgg-branches", "repvgg_a0", {"num_classes": 5}, BATCHNORM),
)  # fmt: skip
"""Name, model of timm, arguments, columns."""

DEMOS: dict[str, dict[str, Arguments]] = {
    "demo:gpt2": {**LAYERNORM, "fuse-bn": BATCHNORM["fuse-bn"]},  # no BatchNorm: refused
    "demo:vit": LAYERNORM,
    "demo:convnet": BATCHNORM,
}


def checkpoints() -> dict[str, Checkpoint]:
    """Every row by its name."""
    rows = [Checkpoint(name, methods) for name, methods in DEMOS.items()]
    rows += [
        Checkpoint(name, methods, _from_transformers(model, arguments), save, arguments)
        for name, model, arguments, save, methods in TRANSFORMERS
    ]
    rows += [
        Checkpoint(name, methods, _from_timm(model, arguments), _timm, arguments)
        for name, model, arguments, methods in TIMM
    ]
    return {row.name: row for row in rows}


def _from_transformers(model: str, arguments: Arguments) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, model)
        built: nn.Module = cls(cls.config_class(**arguments))
        return built

    return build


def _from_timm(model: str, arguments: Arguments) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        side = arguments.get("img_size", 64)
        built: nn.Module = timm.create_model(
            model, pretrained=False, pretrained_cfg_overlay={"input_size": (3, side, side)}, **arguments
        )
        return built

    return build
