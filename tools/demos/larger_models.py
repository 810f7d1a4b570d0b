"""Models that tools/demos/swap_demos.py needs beside the embedded ones, trained when they are wanted and not shipped.

A small Llama, whose norms are RMSNorms, with a tied head and fewer heads of keys than of queries; and a ViT of sixteen
blocks. They learn what the embedded models have learnt, in their way (tools/demos/train_demos.py), in about three
minutes each on one core. Seeded and single-threaded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demos.digits import digits
from tools.demos.train_demos import (
    GPT2,
    accuracy,
    augment,
    language_model_loss,
    parameters_of,
    read_texts,
    save_digits,
    seed_everything,
    train,
)

SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": GPT2["vocab_size"], "max_position_embeddings": GPT2["n_positions"],
    "tie_word_embeddings": True,
}  # fmt: skip
STEPS, BATCH, WINDOW = 400, 8, 128
HELD_OUT = "heldout.txt"
DEEP_VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224", "size": 8,
    "model_args": {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 16, "num_heads": 4},
}  # fmt: skip
DEEP_STEPS, DEEP_BATCH = 600, 32


def small_llama(folder: Path, text: Path | None) -> Path:
    """The folder of the model, with the text that it has not seen; trained if it is not there.

    Args:
        folder: of the model.
        text: see :func:`tools.demos.corpus.read_bible`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / HELD_OUT).is_file():
        return folder
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = seed_everything()
    texts = read_texts(text)
    end = texts.tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=end, eos_token_id=end))
    ids = texts.train_ids

    def loss_of_step(step: int) -> Tensor:
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW + 1] for start in starts.tolist()])
        return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    train(model, STEPS, 3e-3, loss_of_step, "llama")
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    perplexity = math.exp(language_model_loss(model, texts.held_ids, WINDOW))
    print(json.dumps({"model": "llama", "parameters": parameters_of(model), "perplexity": perplexity}), flush=True)
    # Last: it says that all is there.
    (folder / HELD_OUT).write_text(texts.held_out, encoding="utf-8")
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    return folder


def deep_vit(folder: Path, text: Path | None = None) -> Path:
    """The folder of a ViT of sixteen blocks that reads digits; trained if it is not there.

    Args:
        folder: of the model.
        text: not used.
    """
    import timm

    if (folder / "model.safetensors").is_file():
        return folder
    generator = seed_everything()
    model = timm.create_model(DEEP_VIT["architecture"], num_classes=10, **DEEP_VIT["model_args"])
    images, labels = digits("train", size=DEEP_VIT["size"])

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(images), (DEEP_BATCH,), generator=generator)
        return F.cross_entropy(model(augment(images[rows], generator)), labels[rows], label_smoothing=0.05)

    train(model, DEEP_STEPS, 1e-3, loss_of_step, "vit-16")
    figure = accuracy(model, *digits("test", size=DEEP_VIT["size"]))
    print(json.dumps({"model": "vit-16", "parameters": parameters_of(model), "accuracy": figure}), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_digits(model, DEEP_VIT, folder)
    torch.use_deterministic_algorithms(False)
    return folder
