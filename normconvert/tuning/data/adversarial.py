"""Data that a model rarely meets, made to fit it: what a divisor that no longer follows its input has to fear.

A norm divides each token by its own size, whatever that is. A map with fixed statistics is right for the sizes that it
has learnt from, and models without norms have been seen to lose hundreds of nats on single tokens while the median
stayed what it was. So losses are looked at where activations are unusual: one token over and over, long runs, tokens
that the data learnt from does not have, other scripts; for images noise and constants.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from normconvert.compat.transformers import token_ids
from normconvert.tuning.data.batches import Columns, Data, all_batches
from normconvert.tuning.data.wanted import TEXT, Wanted

EXAMPLES = 16
"""Of each kind."""
SEEN = 512
"""Examples of the data learnt from that are looked at for the tokens they have, or for the values of their pixels."""
RUN = 16
"""Least length of a run of one token."""
SCRIPTS = (
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由,在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "😀🎉🚀 ∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ⇒ √2 ≠ ½ …\tif (a[i]!=0x1F) {return ~b<<3;}\r\n%PDF-1.7 \u202e\ufeff\x00",
)
"""The first article of the Universal Declaration of Human Rights in some scripts, and signs that are none."""


def adversarial(wanted: Wanted, learnt: Data, measured: Data, seed: int = 0) -> list[Columns]:
    """Examples of each kind, as long or as large as those of ``measured``.

    Args:
        wanted: what the model takes.
        learnt: what is learnt from: its tokens are common, its pixels are what a pixel may be.
        measured: what the figures are of.
        seed: of what is drawn.

    Returns:
        A set for each kind, by name. None for a model that needs more than one input, which could not be made to fit.
    """
    example = measured.batch([0])
    if set(example) - {wanted.main, "labels", "attention_mask"}:
        return []
    generator = torch.Generator().manual_seed(seed)
    main = example[wanted.main]
    if wanted.main != TEXT:
        return list(_images(wanted, learnt, main, generator)) if main.is_floating_point() else []
    return [_labelled(name, ids, measured) for name, ids in _texts(wanted, learnt, int(main.shape[1]), generator)]


def _labelled(name: str, ids: Tensor, measured: Data) -> Columns:
    """Of a language model the labels of any text are its tokens; other labels are not known."""
    columns = {TEXT: ids} | ({"labels": ids} if measured.shifted else {})
    return Columns(name, columns, shifted=measured.shifted)


def _texts(wanted: Wanted, learnt: Data, length: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    size = wanted.vocabulary
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in all_batches(learnt, 32, SEEN):
        counts += torch.bincount(batch[TEXT].flatten(), minlength=size)
    shape = (EXAMPLES, length)
    yield "one token repeated", torch.randint(0, size, (EXAMPLES, 1), generator=generator).expand(shape).contiguous()
    runs = torch.randint(0, size, shape, generator=generator)
    run = max(RUN, length // 8)
    yield "long runs", runs[:, ::run].repeat_interleave(run, 1)[:, :length].contiguous()
    # Those that never occur, or where there are hardly any, the rarest tenth.
    rarest = counts.argsort(stable=True)[: max(int((counts == 0).sum()), size // 10, 1)]
    drawn = torch.randint(0, len(rarest), shape, generator=generator)
    yield "rare tokens", rarest[drawn]
    tokenizer = wanted.source.tokenizer()
    if tokenizer is not None:
        rows = []
        for text in SCRIPTS:
            ids = torch.tensor(token_ids(tokenizer, text, add_special_tokens=False, verbose=False), dtype=torch.int64)
            if len(ids):
                rows.append(ids.repeat(-(-length // len(ids)))[:length])
        yield "other scripts", torch.stack(rows)


def _images(wanted: Wanted, learnt: Data, main: Tensor, generator: torch.Generator) -> Iterator[Columns]:
    """Noise and constants within the values that pixels have."""
    shape = (EXAMPLES, *main.shape[1:])
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    for batch in all_batches(learnt, 32, SEEN):
        low, high = torch.minimum(low, batch[wanted.main].min()), torch.maximum(high, batch[wanted.main].max())
    noise = low + (high - low) * torch.rand(shape, generator=generator)
    yield Columns("noise", {wanted.main: noise.to(main.dtype)})
    dots = torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    yield Columns("black and white noise", {wanted.main: dots.to(main.dtype)})
    levels = torch.linspace(float(low), float(high), EXAMPLES).reshape(-1, *[1] * (main.ndim - 1))
    yield Columns("constant images", {wanted.main: levels.expand(shape).contiguous().to(main.dtype)})
