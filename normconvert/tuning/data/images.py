"""Folders of images, one subfolder a class, made ready as the model's own library does; and small distortions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normconvert.errors import InputError
from normconvert.tuning.data.wanted import Wanted

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class ImageFolder:
    """Images that are read when they are wanted.

    Attributes:
        name: what the user named.
        files: the images.
        labels: their classes; empty: not known.
        argument: of the model.
        transform: a PIL image -> (channels, height, width).
    """

    name: str
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    argument: str
    transform: Callable[[Any], Tensor]
    shifted: bool = False

    @property
    def labelled(self) -> bool:
        """Whether the classes are known."""
        return bool(self.labels)

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """The images at ``indices``.

        Raises:
            InputError: one is not readable.
        """
        found = {self.argument: torch.stack([self._read(self.files[i]) for i in indices])}
        if self.labels:
            found["labels"] = torch.tensor([self.labels[i] for i in indices])
        return found

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(file) as image:
                return self.transform(image)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
            raise InputError(f"{file}: not a readable image: {error}") from error


def read_images(name: str, path: Path, wanted: Wanted) -> ImageFolder:
    """All images below a folder; its subfolders, in the order of their names, are the classes.

    If they are not as many as the model's, the images have no labels.

    Raises:
        InputError: there are none, or the model does not take images.
    """
    if wanted.shape is None:
        raise InputError(f"{name}: images, but {wanted.source.architecture} takes {wanted.main}")
    if not path.is_dir():
        raise InputError(f"{name}: no such folder")
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for number, folder in enumerate(classes):
        here = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        files += here
        labels += [number] * len(here)
    loose = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if loose and not files:
        files, labels = loose, []
    if wanted.classes is not None and len(classes) != wanted.classes:
        labels = []  # which of the model's classes these are is not known
    if not files:
        raise InputError(f"{name}: no images there (looked for {', '.join(sorted(SUFFIXES))})")
    data = ImageFolder(name, tuple(files), tuple(labels), wanted.main, transform_for(wanted))
    data.batch([0])
    return data


def transform_for(wanted: Wanted) -> Callable[[Any], Tensor]:
    """What makes an image ready for the model, as its library does it."""
    assert wanted.shape is not None
    channels, height, width = wanted.shape
    config = wanted.source.config
    if wanted.source.library == "timm":
        described = config.get("pretrained_cfg") or config
        mean, std = described.get("mean", [0.5] * channels), described.get("std", [0.5] * channels)
        return _Plain(channels, height, width, tuple(mean), tuple(std))
    if wanted.source.folder is not None and (wanted.source.folder / "preprocessor_config.json").is_file():
        from transformers import AutoImageProcessor

        return _Processor(AutoImageProcessor.from_pretrained(wanted.source.folder, local_files_only=True), wanted.main)
    return _Plain(channels, height, width, (0.5,) * channels, (0.5,) * channels)


@dataclass(frozen=True)
class _Plain:
    """Resize, scale to 0..1, subtract the mean and divide by the standard deviation."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any) -> Tensor:
        import numpy as np

        image = image.convert("L" if self.channels == 1 else "RGB").resize((self.width, self.height), resample=2)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
        pixels = pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)
        shape = (-1, 1, 1)
        return (pixels - torch.tensor(self.mean).reshape(shape)) / torch.tensor(self.std).reshape(shape)


@dataclass(frozen=True)
class _Processor:
    """A transformers image processor."""

    processor: Any
    argument: str

    def __call__(self, image: Any) -> Tensor:
        found: Tensor = self.processor(image.convert("RGB"), return_tensors="pt")[self.argument][0]
        return found


@dataclass(frozen=True)
class Distorted:
    """Images in memory that are rotated, scaled and shifted a little when they are learnt from.

    Attributes:
        name: what the user named.
        argument: of the model.
        images: float32 (examples, channels, height, width).
        labels: int64 (examples,).
        background: the value of an empty pixel.
    """

    name: str
    argument: str
    images: Tensor
    labels: Tensor
    background: float
    labelled: bool = True
    shifted: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """The images at ``indices``; with a seed for each, distorted."""
        images = self.images[indices]
        if seeds is not None:
            images = distort(images, seeds, self.background)
        return {self.argument: images, "labels": self.labels[indices]}


def distort(images: Tensor, seeds: list[int], background: float) -> Tensor:
    """Small random rotations, scalings and shifts of (examples, channels, height, width); same shape.

    Each image has a seed of its own, so that it does not matter which process distorts it.
    """
    drawn = torch.stack([torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]) * 2 - 1
    angle, scale, right, down = drawn[:, 0] * 0.2, 1 + drawn[:, 1] * 0.1, drawn[:, 2] * 0.15, drawn[:, 3] * 0.15
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background  # it pads with zeros
