"""Train the models embedded in the package (``demo:gpt2``, ``demo:vit``, ``demo:convnet``).

    apt-get install bible-kjv                  # the King James text, for gpt2 only
    python tools/demos/train_demos.py all            # about 25 minutes on one core

Each goes into ``normconvert/demos/NAME`` with its weights, configuration and a model card that states what it learnt.
Seeded and single-threaded: the same machine with the same versions of torch gives the same bytes again; another
processor may round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: make `tools` importable

from tools.demos.cards import card, digits_results, text_results
from tools.demos.corpus import HELD_OUT, cut, read_bible
from tools.demos.digits import MEAN, STD, digits

DEMOS = Path(__file__).resolve().parents[2] / "normconvert" / "demos"
SEED = 20260101

# Sized so that float32 weights, tokenizer and held-out text stay below 3 MB together.
GPT2 = {"n_layer": 4, "n_embd": 96, "n_head": 4, "n_positions": 256, "vocab_size": 2048}
TEXT_BATCH = 8
END = "<|endoftext|>"


def seed_everything(seed: int = SEED) -> torch.Generator:
    """Seed every generator in use, ask for deterministic kernels; returns a generator for the batches."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    return torch.Generator().manual_seed(seed)


def optimizer_for(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: norms and biases shall be free to leave their initial values."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(model: nn.Module, steps: int, lr: float, loss_of_step: Callable[[int], Tensor], label: str) -> None:
    """AdamW, 5 % warm-up, cosine decay to a twentieth of ``lr``; prints the running loss."""
    optimizer = optimizer_for(model, lr=lr, weight_decay=0.1)
    started, running = time.perf_counter(), math.nan
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.05 * steps))
        scale = warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 49 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"{label}: step {step + 1}/{steps}  loss {running:.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def sha256(file: Path) -> str:
    """The file's SHA-256 in hexadecimal; makes the file readable for everybody, since it goes into the package."""
    file.chmod(0o644)
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- the language model -----------------------------------------------------------------------------------------------


def train_tokenizer(books: list[str]) -> Any:
    """A byte-level BPE as GPT-2's, learnt from the training books."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=GPT2["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=GPT2["n_positions"]
    )


def language_model_loss(model: nn.Module, ids: Tensor, window: int) -> float:
    """Mean negative log-likelihood in nats per token.

    Args:
        model: a causal language model of transformers, in eval mode.
        ids: int64 ``[n]``.
        window: tokens of context; windows overlap by one token, so that every token but the first is predicted once.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window]
            logits = model(input_ids=part[None]).logits[0, :-1]
            total += F.cross_entropy(logits.double(), part[1:], reduction="sum").item()
            count += len(part) - 1
    return total / count


def unigram_loss(train_ids: Tensor, ids: Tensor, vocab: int) -> float:
    """What a model that knows only how frequent each token is would score (add-one smoothing), nats per token."""
    counts = torch.bincount(train_ids, minlength=vocab).double() + 1
    return F.nll_loss(torch.log(counts / counts.sum()).expand(len(ids), vocab), ids).item()


@dataclass(frozen=True)
class Texts:
    """The corpus, as text and as tokens.

    Attributes:
        held_out: the held-out books as one text.
        train_ids, held_ids: int64 ``[n]``.
        tokenizer: learnt from the training books.
    """

    held_out: str
    train_ids: Tensor
    held_ids: Tensor
    tokenizer: Any


def read_texts(text: Path | None) -> Texts:
    """The King James text, cut, with a tokenizer learnt from its training part."""
    corpus = cut(read_bible(text))
    tokenizer = train_tokenizer(corpus.train)
    end = tokenizer.eos_token_id

    def encode(books: list[str]) -> Tensor:
        # verbose=False: a book is longer than the context on purpose
        return torch.cat([torch.tensor([end, *tokenizer(book, verbose=False).input_ids]) for book in books])

    return Texts("\n".join(corpus.held_out), encode(corpus.train), encode(corpus.held_out), tokenizer)


def train_gpt2(folder: Path, text: Path | None, steps: int) -> None:
    """A small GPT-2 on the King James text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    generator = seed_everything()
    texts = read_texts(text)
    end = texts.tokenizer.eos_token_id
    config = GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end)
    model = GPT2LMHeadModel(config)
    window, train_ids = GPT2["n_positions"], texts.train_ids
    counted = f"{parameters_of(model):,} parameters, {len(train_ids):,} tokens, {len(texts.held_ids):,} held out"
    print(f"gpt2: {counted}", flush=True)

    def loss_of_step(step: int) -> Tensor:
        starts = torch.randint(len(train_ids) - window - 1, (TEXT_BATCH,), generator=generator)
        ids = torch.stack([train_ids[start : start + window + 1] for start in starts.tolist()])
        return F.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())

    started = time.perf_counter()
    train(model, steps, 3e-3, loss_of_step, "gpt2")
    minutes = (time.perf_counter() - started) / 60
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(texts.held_out, encoding="utf-8")
    figures = text_figures(model, texts)
    facts = text_facts(model, texts, folder, steps) | {"minutes": minutes}
    (folder / "README.md").write_text(card("gpt2", facts | figures, text_results(figures)), encoding="utf-8")
    print(json.dumps(figures, indent=2))


def parameters_of(model: nn.Module) -> int:
    """How many numbers a model holds."""
    return sum(p.numel() for p in model.parameters())


def text_figures(model: nn.Module, texts: Texts) -> dict[str, float]:
    """What the language model learnt: nats per token, held out and seen, and what they amount to."""
    window = GPT2["n_positions"]
    loss = language_model_loss(model, texts.held_ids, window)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "unigram_loss": unigram_loss(texts.train_ids, texts.held_ids, GPT2["vocab_size"]),
        "train_loss": language_model_loss(model, texts.train_ids[: len(texts.held_ids)], window),
        "bits_per_byte": loss * (len(texts.held_ids) - 1) / math.log(2) / len(texts.held_out.encode()),
    }


def text_facts(model: Any, texts: Texts, folder: Path, steps: int) -> dict[str, Any]:
    """How the language model was made, and a text that it wrote, for the card."""
    with torch.no_grad():
        torch.manual_seed(SEED)
        ids = texts.tokenizer("And it came to pass", return_tensors="pt")
        sample = model.generate(**ids, max_new_tokens=80, do_sample=True, top_k=20)
    tokens = steps * TEXT_BATCH * GPT2["n_positions"]
    return {
        **GPT2,
        "parameters": parameters_of(model),
        "tokens": tokens,
        "epochs": tokens / len(texts.train_ids),
        "held_out_books": ", ".join(HELD_OUT),
        "held_out_tokens": len(texts.held_ids),
        "sample": texts.tokenizer.decode(sample[0]),
        "sha256": sha256(folder / "model.safetensors"),
        "steps": steps,
        "torch": torch.__version__.partition("+")[0],
    }


# --- the digit models -------------------------------------------------------------------------------------------------

DIGIT_MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4},
        "size": 8,
        "epochs": 120,
        "lr": 2e-3,
    },
    "convnet": {
        "architecture": "resnet10t",
        "model_args": {"in_chans": 1, "channels": [16, 32, 64, 96], "stem_width": 16},
        "size": 32,
        "epochs": 30,
        "lr": 4e-3,
    },
}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scalings and shifts; same shape."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(0.2), 1 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, uniform(0.15)], 1), torch.stack([sin, cos, uniform(0.15)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    background = -MEAN / STD  # what grid_sample pads with is 0, the empty pixel is not
    return F.grid_sample(images - background, grid, align_corners=False) + background


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` ``[n, 1, h, w]`` whose largest logit is the label's."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def train_digits(name: str, folder: Path) -> None:
    """One of :data:`DIGIT_MODELS` on scikit-learn's digits."""
    import timm

    row = DIGIT_MODELS[name]
    generator = seed_everything()
    model = timm.create_model(row["architecture"], num_classes=10, **row["model_args"])
    images, labels = digits("train", size=row["size"])
    batch = 64
    per_epoch = len(images) // batch
    print(f"{name}: {parameters_of(model):,} parameters, {len(images):,} training images", flush=True)
    order = torch.empty(0, dtype=torch.int64)

    def loss_of_step(step: int) -> Tensor:
        nonlocal order
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[step % per_epoch * batch :][:batch]
        return F.cross_entropy(model(augment(images[rows], generator)), labels[rows], label_smoothing=0.05)

    started = time.perf_counter()
    train(model, row["epochs"] * per_epoch, row["lr"], loss_of_step, name)
    minutes = (time.perf_counter() - started) / 60
    save_digits(model, row, folder)
    test_images, test_labels = digits("test", size=row["size"])
    with torch.no_grad():
        test_loss = F.cross_entropy(model(test_images), test_labels).item()
    figures = {
        "accuracy": accuracy(model, test_images, test_labels),
        "loss": test_loss,
        "train_accuracy": accuracy(model, images, labels),
    }
    facts = digits_facts(model, row, folder) | {"minutes": minutes}
    (folder / "README.md").write_text(card(name, facts | figures, digits_results(figures)), encoding="utf-8")
    print(json.dumps(figures, indent=2))


def save_digits(model: nn.Module, row: dict[str, Any], folder: Path) -> None:
    """Write a digit model as timm writes models for the hub."""
    from timm.models import save_for_hf

    data_config = {
        "input_size": (1, row["size"], row["size"]),
        "mean": (MEAN,),
        "std": (STD,),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": {"tag": "digits"}},  # not the tag of the ImageNet weights of that architecture
        model_args=row["model_args"],
        data_config=data_config,
        safe_serialization=True,
    )


def digits_facts(model: nn.Module, row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How a digit model was made, for the card."""
    return {
        "architecture": row["architecture"],
        "model_args": ", ".join(f"{key}={value}" for key, value in row["model_args"].items()),
        "parameters": parameters_of(model),
        "epochs": row["epochs"],
        "size": row["size"],
        "sha256": sha256(folder / "model.safetensors"),
        "torch": torch.__version__.partition("+")[0],
    }


def main() -> None:
    """Parse the command line and train what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["all", "gpt2", *DIGIT_MODELS])
    parser.add_argument("--text", type=Path, help="the King James text, one verse a line, instead of Debian's reader")
    parser.add_argument("--out", type=Path, default=DEMOS, help="folder of the demo models (default: the package's)")
    parser.add_argument("--steps", type=int, default=1200, help="steps of the language model (default: 1200)")
    options = parser.parse_args()
    names = ["gpt2", *DIGIT_MODELS] if "all" in options.names else options.names
    torch.set_num_threads(1)  # with several threads the order of additions, and so the bytes, may differ
    for name in names:
        if name == "gpt2":
            train_gpt2(options.out / name, options.text, options.steps)
        else:
            train_digits(name, options.out / name)


if __name__ == "__main__":
    main()
