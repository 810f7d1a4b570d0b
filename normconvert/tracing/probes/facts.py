"""What a model tells about its inputs: forward's signature, the config, the shapes of its first layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sizes:
    """The free choices of one guess; the model's own demands (a fixed image size, say) come first where it has any.

    Attributes:
        batch, length: of text.
        image: side of a square image; None takes the config's ``image_size``, or 64.
        samples: of raw audio; frames: of a spectrogram or a video, None takes what the config says.
        layout: which of several possible layouts of an input to try (0 is the likely one).
    """

    batch: int = 2
    length: int = 7
    image: int | None = None
    samples: int = 3840
    frames: int | None = None
    layout: int = 0


# Which sub-configs speak for a modality, as parts of their names.
PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("vision", "image", "backbone", "encoder"),
    "detail": ("high_res",),
    "audio": ("audio", "speech", "encoder"),
    "text": ("text", "llm", "language", "decoder"),
}


class Facts:
    """A model's signature and config, looked up by name.

    Config values are searched first in the sub-configs of the modality asked for, then in the config itself, then in
    all other sub-configs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.counted: dict[Any, int] = {}  # inputs of a signal -> how many features they give, once the model was asked

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The named parameters of ``forward``."""
        named = inspect.signature(self.model.forward).parameters.values()
        return {p.name: p for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    @cached_property
    def required(self) -> list[str]:
        """The parameters without a default."""
        return [name for name, p in self.parameters.items() if p.default is inspect.Parameter.empty]

    @cached_property
    def main(self) -> list[str]:
        """The main input names that the class declares and ``forward`` takes."""
        declared = getattr(self.model, "main_input_name", None) or []
        names = [declared] if isinstance(declared, str) else list(declared)
        return [name for name in names if name in self.parameters]

    def configs(self, part: str | None = None) -> Iterator[Any]:
        """The config and its sub-configs, those of `part` first."""
        if self.config is None:
            return
        found: list[tuple[str, Any]] = [("", self.config)]
        for path, config in found:
            for key, value in vars(config).items():
                if hasattr(value, "to_dict") and not any(value is other for _, other in found) and len(found) < 40:
                    found.append((f"{path}.{key}", value))
        words = PARTS.get(part or "", ())

        def rank(item: tuple[int, tuple[str, Any]]) -> tuple[int, int]:
            position, (path, _) = item
            matches = [i for i, word in enumerate(words) if word in path]
            return (matches[0] if matches else len(words) + (1 if path else 0), position)

        for _, (_, config) in sorted(enumerate(found), key=rank):
            yield config

    def get(self, *names: str, part: str | None = None, default: Any = None) -> Any:
        """The first of these config attributes that is set."""
        for config in self.configs(part):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def number(self, *names: str, part: str | None = None, default: int = 0) -> int:
        """The first of these config attributes that is an integer (or a sequence of them: its first)."""
        for config in self.configs(part):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                    value = value[0]
                # True is an integer in Python, and no size.
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def first(self, kind: type[nn.Module]) -> Any:
        """The first module of a class, in the order of definition; None if there is none."""
        return next((m for m in self.model.modules() if isinstance(m, kind)), None)

    @cached_property
    def classifies_texts(self) -> bool:
        """Whether an encoder–decoder has a head for whole texts: of them it makes the decoder's input itself."""
        generates: Any = getattr(self.model, "can_generate", None)
        return {"decoder_input_ids", "labels"} <= set(self.parameters) and not (generates is not None and generates())

    @cached_property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        try:
            table = self.model.get_input_embeddings()  # type: ignore[operator]
        except Exception:  # a model without text has many ways to say so
            table = None
        if isinstance(table, nn.Embedding):
            return int(table.num_embeddings)
        return self.number("vocab_size", part="text", default=32)

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) that the config or the patch embedding fixes; None if free."""
        ratios, patch = self.get("scaled_images_ratios"), self.number("patch_size")
        if ratios and patch:  # cut at several scales into patches, of which the smallest scale must hold one
            return (side := int(patch / min(ratios))), side
        value = self.get("image_size", "img_size", "input_size", "max_img_size", part="vision")
        if isinstance(value, dict):
            value = (value.get("height", 224), value.get("width", 224))
        if isinstance(value, int):
            return value, value
        if isinstance(value, (list, tuple)) and len(value) >= 2:
            return int(value[-2]), int(value[-1])
        for module in self.model.modules():  # timm's patch embeddings know, where the config does not
            fixed = getattr(module, "img_size", None)
            if isinstance(fixed, (list, tuple)) and len(fixed) == 2 and all(type(side) is int for side in fixed):
                return fixed[0], fixed[1]
        return None

    @cached_property
    def channels(self) -> int:
        """Of an image."""
        return self.number("num_channels", "in_channels", "in_chans", "num_input_channels", part="vision", default=3)
