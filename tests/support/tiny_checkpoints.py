"""Small checkpoints on disk, with perturbed weights, in every form that a source may have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.perturb import perturb

GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT_ARGUMENTS: dict[str, Any] = {"img_size": 32, "depth": 2}


def gpt2(**changes: Any) -> nn.Module:
    """A tiny GPT-2 language model, perturbed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return perturb(GPT2LMHeadModel(GPT2Config(**{**GPT2_SIZES, **changes})).eval())


def gpt2_without_head() -> nn.Module:
    """The body of one. Half as long to trace: a model with a head is loaded as its body, too, so both are traced."""
    from transformers import GPT2Config, GPT2Model

    return perturb(GPT2Model(GPT2Config(**GPT2_SIZES)).eval())


def vit() -> nn.Module:
    """A tiny timm ViT, perturbed."""
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT_ARGUMENTS)
    return perturb(model.eval())


def save(model: nn.Module, folder: Path, form: str = "safetensors") -> Path:
    """Save a transformers model as ``safetensors``, ``sharded``, ``bin`` or ``sharded-bin``."""
    saver: Any = model
    if form in ("safetensors", "sharded"):
        saver.save_pretrained(folder, max_shard_size="60KB" if form == "sharded" else "1GB")
        return folder
    folder.mkdir(parents=True)
    saver.config.architectures = [type(model).__name__]
    saver.config.save_pretrained(folder)
    state = model.state_dict()
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({name: state[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def save_with_head(folder: Path, form: str = "safetensors", head: float = 0.5) -> Path:
    """A GPT-2 whose config ties head and table, and whose files (``safetensors``, ``bin``) hold both, apart."""
    from safetensors.torch import save_file

    model = gpt2()
    save(model, folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["lm_head.weight"] += head * torch.randn(state["lm_head.weight"].shape)
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_vit(model: nn.Module, folder: Path, arguments: dict[str, Any] | None = None) -> Path:
    """Save a timm model as timm saves it for the hub."""
    from timm.models import save_for_hf

    save_for_hf(model, folder, model_args=arguments or VIT_ARGUMENTS, safe_serialization=True)
    return folder


def talkative(folder: Path) -> None:
    """Give a checkpoint code of its own that prints as it is imported."""
    (folder / "mine.py").write_text(
        "from transformers import GPT2LMHeadModel\nprint('hello from the model')\n"
        "class Mine(GPT2LMHeadModel):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative name; a card as if the folder that it names were called FOLDER."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for place in ('"', '"local-dir:') if "README.md" in found else ():
        named = f'{place}{folder.name}"'.encode()
        found["README.md"] = found["README.md"].replace(named, f'{place}FOLDER"'.encode())
    return found


def with_tokenizer(checkpoint: Path, folder: Path, **options: Any) -> Path:
    """A copy of a tiny GPT-2's files in ``folder``, with a tokenizer of the words ``w0`` to ``w100``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(checkpoint, folder)
    words = {f"w{i}": i for i in range(GPT2_SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", **options).save_pretrained(folder)
    return folder
