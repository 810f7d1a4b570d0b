"""scikit-learn's handwritten digits as tensors: nothing is downloaded, and what is held out is in this package.

1,797 grey images of 8×8 pixels from the UCI repository (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits"); one in five is held out, the same ones always.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from normconvert.files.embedded import held_out_digits

MEAN, STD = 0.5, 0.5


def digits(split: Literal["train", "test"], *, size: int = 8) -> tuple[Tensor, Tensor]:
    """One part of the data, normalised as the demo models expect it.

    Args:
        split: ``train`` (1,437 images) or ``test`` (360), stratified by digit.
        size: height and width to enlarge the images to (bilinear).

    Returns:
        Images, float32 ``[n, 1, size, size]``; labels, int64 ``[n]``.

    Raises:
        ImportError: scikit-learn, which has the training set, is not installed.
    """
    pixels, labels = held_out_digits() if split == "test" else _training_digits()
    images = pixels.to(torch.float32)[:, None] / 16
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return (images - MEAN) / STD, labels


def _training_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows, _ = train_test_split(range(len(data.target)), test_size=360, random_state=0, stratify=data.target)
    return torch.from_numpy(data.images[rows]), torch.from_numpy(data.target[rows]).to(torch.int64)
