"""Other arguments than the default with which a timm model fits a checkpoint: image size and input channels.

A model trained on larger images has more position embeddings, one trained on grey images a narrower first convolution.
Which size it was is guessed from how the shapes differ, and proved by building the model with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from math import isqrt

from normconvert.identification.prints import Fit, Print, compare, is_exact
from normconvert.identification.result import Shape

Reshaped = tuple[tuple[str, Shape, Shape], ...]
CHANNELS = 3
MOST_CHANNELS = 16
MOST_EXTRA_TOKENS = 16
"""Class, distillation and register tokens before those of the patches."""
MOST_SIZES = 4
"""So many image sizes are tried."""


def solve(known: Print, fit: Fit, found: Mapping[str, Shape], integers: frozenset[str]) -> dict[str, int] | None:
    """Arguments of ``timm.create_model`` with which a model fits a checkpoint exactly; None if there are none.

    Args:
        known: the model's fingerprint with default arguments.
        fit: how the checkpoint differs from it.
        found: the checkpoint's tensors, names and shapes.
        integers: those of them that hold no floating numbers.
    """
    # These arguments change shapes and no names: what differs otherwise is another model.
    if not fit.reshaped or fit.missing or fit.extra or fit.num_classes is None:
        return None
    from normconvert.identification.building import build, default_image, shapes

    side = default_image(known.name)
    sizes = image_sizes(fit.reshaped, side) if side else []
    for size, channels in product([None, *sizes], [None, *input_channels(fit.reshaped)]):
        arguments = {k: v for k, v in (("img_size", size), ("in_chans", channels)) if v is not None}
        if not arguments:
            continue
        try:
            # Built, not computed: how a model's shapes follow from the image is its constructor's own business.
            model = build(known.name, num_classes=fit.num_classes, **arguments)
        except Exception:  # the model knows no such argument, or takes no such value
            continue
        # With its classifier in the core, since the number of classes is settled here.
        if is_exact(compare(found, integers, Print(known.name, shapes(model), {}, known.tied, known.optional))):
            return arguments
    return None


def image_sizes(reshaped: Reshaped, side: int) -> list[int]:
    """The image sizes that different shapes speak of, the likeliest first.

    Args:
        reshaped: (tensor, shape found, shape at image size ``side``).
        side: the default image size in pixels.
    """
    votes: Counter[int] = Counter()
    for _, found, expected in reshaped:
        if len(found) == len(expected):
            # Each tensor votes once for each size, so that long shapes do not count for more.
            differing = [(f, e) for f, e in zip(found, expected, strict=True) if f != e]
            votes.update({size for f, e in differing for size in _sizes(f, e, side)})
    return [size for size, _ in votes.most_common(MOST_SIZES)]


def _sizes(found: int, expected: int, side: int) -> Iterator[int]:
    """Sides at which one dimension is ``found`` instead of ``expected``: rows, patches, or offsets between patches."""
    ratios = [(found, expected)]
    for tokens in range(MOST_EXTRA_TOKENS + 1):
        a, b = isqrt(max(found - tokens, 0)), isqrt(max(expected - tokens, 0))
        # From a grid of one patch every size would follow.
        if a * a == found - tokens and b * b == expected - tokens and b > 1:
            ratios.append((a, b))  # a grid of a x a patches
            if a % 2 and b % 2:
                ratios.append(((a + 1) // 2, (b + 1) // 2))  # relative positions, (2 a - 1) x (2 a - 1)
    for a, b in ratios:
        if side * a % b == 0 and 0 < side * a // b != side:
            yield side * a // b


def input_channels(reshaped: Reshaped) -> list[int]:
    """The numbers of input channels that different shapes speak of."""
    votes: Counter[int] = Counter()
    for _, found, expected in reshaped:
        for f, e in zip(found, expected, strict=False):
            if f != e and f * CHANNELS % e == 0 and 0 < f * CHANNELS // e <= MOST_CHANNELS:
                votes[f * CHANNELS // e] += 1
    # Two, since each is built with each image size.
    return [channels for channels, _ in votes.most_common(2)]
