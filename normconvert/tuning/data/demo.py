"""The embedded models' own data: digits for the images; for the language model text that it makes itself.

The text that ``demo:gpt2`` learnt from is not shipped. A teacher can only teach what it knows, so text sampled from it
serves as well; what is shipped, books that it has not seen, stays for measuring.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.files.embedded import held_out_text
from normconvert.tuning.data.batches import Columns
from normconvert.tuning.data.images import Distorted
from normconvert.tuning.data.text import from_ids, windows_of
from normconvert.tuning.data.wanted import TEXT, Wanted

SAMPLES = 256
"""Texts that a language model makes."""


def demo_data(
    name: str, wanted: Wanted, teacher: nn.Module, length: int | None, *, held_out: bool
) -> Columns | Distorted:
    """What the embedded model learnt from, or with ``held_out`` what it is measured on.

    Args:
        name: what the user named.
        wanted: what the model takes.
        teacher: makes the text.
        length: tokens a text.
        held_out: the test set.

    Raises:
        InputError: the model takes something else, or scikit-learn is not installed.
    """
    if wanted.main == TEXT:
        if held_out:
            return windows_of(name, [held_out_text()], wanted, length)
        return from_ids(name, sample(teacher, wanted, length or 256), wanted, length)
    if wanted.shape is None or wanted.shape[0] != 1:
        raise InputError(f"{name}: the embedded data are text and grey digits; the model takes {wanted.main}")
    from normconvert.tuning.data.digits import MEAN, STD, digits

    try:
        images, labels = digits("test" if held_out else "train", size=wanted.shape[1])
    except ImportError as error:
        raise InputError(f"{name}: the digits come with scikit-learn: pip install 'normconvert[swap]'") from error
    return Distorted(name, wanted.main, images, labels, -MEAN / STD)


def sample(model: nn.Module, wanted: Wanted, length: int, count: int = SAMPLES, seed: int = 0) -> Tensor:
    """``count`` texts of ``length`` tokens by a causal language model, at temperature 1, one after the other.

    Raises:
        InputError: it is no causal language model.
    """
    if not wanted.causal:
        raise InputError("only a causal language model can make its own text: give other data")
    length = min(length, wanted.positions or length)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for start in range(0, count, 256):
            n = min(256, count - start)
            ids = torch.randint(0, wanted.vocabulary, (n, 1), generator=generator)
            cache = None
            device = next(model.parameters()).device
            for _ in range(length - 1):
                made = model(input_ids=ids[:, -1:].to(device), past_key_values=cache, use_cache=True)
                cache = made.past_key_values
                chances = made.logits[:, -1].float().softmax(-1).cpu()
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
            found.append(ids)
    return torch.cat(found).reshape(-1)
