"""Model cards of the demo models: front matter as the hub reads it, then what a reader wants to know."""

from __future__ import annotations

import math
from typing import Any

import yaml

_TEXT = """\
# demo:gpt2, a small GPT-2 that has read the King James Bible

Embedded in normconvert so that the main job can be shown and tested without a download. A `GPT2LMHeadModel` with
{n_layer} layers, width {n_embd}, {n_head} heads, context {n_positions}, a byte-level BPE vocabulary
of {vocab_size} and the output head tied to the embedding: {parameters:,} parameters in float32.
It has learnt the words and phrases of that text, and no more.

| on {held_out_tokens:,} held-out tokens | nats per token | perplexity |
| --- | --- | --- |
| **this model** | **{loss:.3f}** | **{perplexity:.1f}** |
| token frequencies alone (unigram, add-one) | {unigram_loss:.3f} | {unigram_perplexity:.1f} |

{bits_per_byte:.3f} bits per byte held out; {train_loss:.3f} nats per token on as much of the training text.

"And it came to pass", continued by sampling from the 20 likeliest tokens (greedy decoding soon repeats itself):

{sample}

**Data.** The King James text from Debian's package `bible-kjv-text`, in the public domain. Held out as whole books, and
shipped here as `heldout.txt`: {held_out_books}. Tokenizer and model have seen the other 62 only.

**Training.** {steps:,} steps of AdamW on {tokens:,} tokens ({epochs:.1f} epochs), {minutes:.0f} minutes on one core:

    apt-get install bible-kjv
    python tools/demos/train_demos.py gpt2

Seeded: the same machine and versions give the same bytes (torch {torch}; SHA-256 of `model.safetensors`:
`{sha256}`). Another processor may round differently.
"""

_DIGITS = """\
# demo:{name}, {what}

Embedded in normconvert so that {why} can be shown and tested without a download. timm's `{architecture}` with
`{model_args}`:
{parameters:,} parameters in float32. It reads one grey digit of {size}×{size} pixels{resized}.

| | accuracy | cross-entropy |
| --- | --- | --- |
| **360 held-out images** | **{accuracy:.2%}** | **{loss:.4f}** |
| 1,437 training images | {train_accuracy:.2%} | |

**Data.** The handwritten digits that scikit-learn ships (`sklearn.datasets.load_digits`): 1,797 images from Alpaydin
and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, CC BY 4.0. Split by
scikit-learn's `train_test_split`, stratified; the held-out images, unchanged, are shipped as `../heldout_digits.csv`.

**Training.** {epochs} epochs of AdamW with small random rotations, scalings and shifts, {minutes:.1f} minutes on
one core:

    python tools/demos/train_demos.py {name}

Seeded: the same machine and versions give the same bytes (torch {torch}; SHA-256 of `model.safetensors`:
`{sha256}`). Another processor may round differently.
"""

_DIGIT_WORDS = {
    "vit": {"what": "a small vision transformer for handwritten digits", "why": "the main job", "resized": ""},
    "convnet": {
        "what": "a small BatchNorm ResNet for handwritten digits",
        "why": "`fuse-bn`",
        "resized": " (8×8, enlarged bilinearly)",
    },
}


def _results(task: str, dataset: dict[str, str], metrics: dict[str, float]) -> list[dict[str, Any]]:
    rows = [{"type": key, "value": round(value, 6)} for key, value in metrics.items()]
    return [{"task": {"type": task}, "dataset": dataset, "metrics": rows}]


def text_results(figures: dict[str, float]) -> list[dict[str, Any]]:
    """Rows for the front matter's ``model-index``, for the language model."""
    dataset = {"name": "King James Bible, held-out books", "type": "heldout.txt"}
    return _results("text-generation", dataset, {key: figures[key] for key in ("loss", "perplexity")})


def digits_results(figures: dict[str, float]) -> list[dict[str, Any]]:
    """Rows for the front matter's ``model-index``, for a digit model."""
    dataset = {"name": "scikit-learn digits, 360 held out", "type": "sklearn/digits"}
    return _results("image-classification", dataset, {key: figures[key] for key in ("accuracy", "loss")})


def card(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The text of ``README.md``.

    Args:
        name: ``gpt2``, ``vit`` or ``convnet``.
        facts: the values that the card's text names.
        results: of :func:`text_results` or :func:`digits_results`.
    """
    text = name == "gpt2"
    front = {
        "license": "apache-2.0",
        "library_name": "transformers" if text else "timm",
        "pipeline_tag": "text-generation" if text else "image-classification",
        **({"language": "en"} if text else {}),
        "tags": ["normconvert", "demo"],
        "model-index": [{"name": f"demo:{name}", "results": results}],
    }
    if text:
        sample = "\n".join(f"> {line}" for line in facts["sample"].splitlines())
        body = _TEXT.format(**{**facts, "sample": sample, "unigram_perplexity": math.exp(facts["unigram_loss"])})
    else:
        body = _DIGITS.format(name=name, **_DIGIT_WORDS[name], **facts)
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{body}"
