"""Rules of the table of inputs, each with a small module that runs on nothing else; and what a run leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.compat.torch import as_exported
from normconvert.errors import TraceError
from normconvert.tracing.graph import trace
from normconvert.tracing.probes import trace_inputs
from normconvert.tracing.probes.asking import call_fake


def accepted(model: nn.Module, config: Any = None) -> dict[str, Any]:
    """The inputs that are found, on which the model runs."""
    model = model.to("meta").eval()
    model.config = config
    inputs = trace_inputs(model)
    call_fake(model, model, inputs)
    return inputs


class Tower(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values)


class Encodes(nn.Module):
    """Calls what its encoder takes ``inputs``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Tower()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs)


def test_inputs_are_what_the_encoder_says_it_takes() -> None:
    inputs = accepted(Encodes())["inputs"]
    assert inputs.shape[1] == 3
    assert inputs.is_floating_point()


class Patches(nn.Module):
    def __init__(self, img_size: tuple[int, int]) -> None:
        super().__init__()
        self.img_size: tuple[int, int] | None = img_size
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError("another size")
        return self.conv(x)


class OfOneSize(nn.Module):
    """Takes images of one size only."""

    def __init__(self, side: tuple[int, int], says: bool) -> None:
        super().__init__()
        self.embed = Patches(side)
        if not says:
            self.embed.img_size, self.side = None, side

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.embed.img_size is not None:
            return self.embed(pixel_values)
        if tuple(pixel_values.shape[-2:]) != self.side:
            raise ValueError("another size")
        return self.embed.conv(pixel_values)


def test_a_module_says_how_large_an_image_is_where_the_configuration_does_not() -> None:
    assert accepted(OfOneSize((40, 24), says=True))["pixel_values"].shape == (2, 3, 40, 24)


def test_the_largest_image_is_the_size_where_none_is_named() -> None:
    config = SimpleNamespace(max_img_size=36)
    assert accepted(OfOneSize((36, 36), says=False), config)["pixel_values"].shape == (2, 3, 36, 36)


class Windows(nn.Module):
    """Takes windows of two patches by two, each as a small image with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        return self.conv(pixel_values.permute(0, 3, 1, 2)).flatten(1)


def test_windows_of_patches_are_tried_as_small_images_with_their_channels_last() -> None:
    inputs = accepted(Windows(), SimpleNamespace(patch_size=4, spatial_merge_size=2))
    assert inputs["pixel_values"].shape[1:] == (8, 8, 3)
    assert len(inputs["pixel_values"]) == int(inputs["image_grid_thw"].prod(1).sum())


class Both(nn.Module):
    """Wants an image and a sound, though neither argument is required."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.hear = nn.Conv2d(3, 4, 4), nn.Linear(80, 4)

    def forward(self, pixel_values: Tensor | None = None, input_features: Tensor | None = None) -> Tensor:
        if pixel_values is None or input_features is None:
            raise ValueError("one is missing")
        return self.see(pixel_values).sum((2, 3)) + self.hear(input_features).sum(1)


def test_all_signals_are_given_at_once_to_a_model_that_runs_on_no_single_one() -> None:
    assert set(accepted(Both())) == {"pixel_values", "input_features"}


class Finder(nn.Module):
    """Finds named things in images, and remembers what the names were turned into."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.read = nn.Conv2d(3, 8, 4, 4), nn.Embedding(32, 8)
        self.known = Remembered()

    def forward(
        self,
        pixel_values: Tensor,
        classes_input_ids: Tensor,
        classes_attention_mask: Tensor,
        tasks_input_ids: Tensor,
        tasks_attention_mask: Tensor,
        classes_structure: Tensor,
    ) -> Tensor:
        for ids, mask in zip(classes_input_ids, classes_attention_mask, strict=True):
            name = tuple(ids[mask != 0].tolist())
            if name not in self.known.names:
                self.known.names[name] = self.read(ids).mean(0)
        names = torch.stack([self.known.names[tuple(ids.tolist())] for ids in classes_input_ids])
        names = torch.stack(names.split(classes_structure.tolist()))
        task = self.read(tasks_input_ids * tasks_attention_mask).mean(1)
        return names @ (self.see(pixel_values).mean((2, 3)) + task).unsqueeze(-1)


class Remembered:
    def __init__(self) -> None:
        self.names: dict[Any, Any] = {}


def test_a_model_that_is_told_what_to_find_is_told_as_many_names_as_it_is_said() -> None:
    inputs = accepted(Finder())
    assert int(inputs["classes_structure"].sum()) == len(inputs["classes_input_ids"])
    assert len(inputs["tasks_input_ids"]) == len(inputs["pixel_values"])


def test_what_a_plain_object_of_a_module_remembers_of_a_run_without_values_is_forgotten() -> None:
    model = Finder()
    accepted(model)
    assert model.known.names == {}
    trace(model, trace_inputs(model))
    assert model.known.names == {}


class Length(nn.Module):
    """Repeats each token as often as the weights say."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.predict = nn.Embedding(32, 4), nn.Linear(4, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return x.new_zeros(int(self.predict(x).sum())) if self.predict(x).sum() > 2 else x


def test_a_length_that_weights_give_is_refused_and_the_reason_says_so() -> None:
    model = Length().to("meta").eval()
    with pytest.raises(TraceError, match=r"depends on values that the weights give.*test_probes_rules\.py:\d+"):
        trace(model, trace_inputs(model))


class Asks(nn.Module):
    """Is exported another way than it runs."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and torch.compiler.is_exporting()):
            raise RuntimeError("this way is not for an export")
        return input_ids.float()


def test_models_are_told_that_they_are_exported() -> None:
    assert not torch.compiler.is_exporting()
    with as_exported():
        assert torch.compiler.is_compiling()
        assert torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()
    assert not torch.compiler.is_exporting()
    accepted(Asks())
