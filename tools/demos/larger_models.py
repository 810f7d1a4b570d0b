"""Models that tools/demos/swap_demos.py needs beside the embedded ones, trained when they are wanted and not shipped.

Two Llamas, whose norms are RMSNorms: a small one with a tied head and fewer heads of keys than of queries, and one of
twelve blocks. They learn what the embedded GPT-2 has learnt, in its way (tools/demos/train_demos.py), in about three
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

from tools.demos.train_demos import GPT2, language_model_loss, parameters_of, read_texts, seed_everything, train

SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": GPT2["vocab_size"], "max_position_embeddings": GPT2["n_positions"],
    "tie_word_embeddings": True,
}  # fmt: skip
STEPS, BATCH, WINDOW = 400, 8, 128
HELD_OUT = "heldout.txt"
MEASURED = 8_000
"""Characters of what is held out, for the deep one, which is swapped many times."""


def small_llama(folder: Path, text: Path | None) -> Path:
    """The folder of a model of four blocks, with the text that it has not seen; trained if it is not there.

    Args:
        folder: of the model.
        text: see :func:`tools.demos.corpus.read_bible`.
    """
    return _llama(folder, text)


def deep_llama(folder: Path, text: Path | None) -> Path:
    """As :func:`small_llama`, of twelve blocks and two thirds of the width."""
    return _llama(folder, text, MEASURED, num_hidden_layers=12, hidden_size=64, intermediate_size=160)


def _llama(folder: Path, text: Path | None, measured: int | None = None, **sizes: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / HELD_OUT).is_file():
        return folder
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = seed_everything()
    texts = read_texts(text)
    end = texts.tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}, bos_token_id=end, eos_token_id=end))
    ids = texts.train_ids

    def loss_of_step(step: int) -> Tensor:
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW + 1] for start in starts.tolist()])
        return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    train(model, STEPS, 3e-3, loss_of_step, folder.name)
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    perplexity = math.exp(language_model_loss(model, texts.held_ids, WINDOW))
    print(json.dumps({"model": folder.name, "parameters": parameters_of(model), "perplexity": perplexity}), flush=True)
    # Last: it says that all is there.
    (folder / HELD_OUT).write_text(texts.held_out[:measured], encoding="utf-8")
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    return folder
