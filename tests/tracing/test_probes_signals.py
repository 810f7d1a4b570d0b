"""What a model is asked about its images and sounds: the arguments they need, and how many features they give."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from normconvert.tracing.graph import trace
from normconvert.tracing.model_graph import trace_model
from normconvert.tracing.probes import trace_inputs
from normconvert.tracing.probes.asking import call_fake, feature_count, needed
from normconvert.tracing.probes.facts import Facts

TEXT = {
    **{"vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 3, "num_key_value_heads": 3},
}
VISION = {
    **{"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"image_size": 28, "patch_size": 7},
}


def accepted(model: nn.Module, config: Any = None) -> dict[str, Any]:
    """The inputs that are found, on which the model runs."""
    model = model.to("meta").eval()
    model.config = config or SimpleNamespace(image_token_id=9, image_size=8)  # type: ignore[assignment]
    inputs = trace_inputs(model)
    call_fake(model, model, inputs)
    return inputs


class Sees(nn.Module):
    """Puts what it sees where the text has placeholders for it, as many as there are features."""

    side = 4

    def __init__(self) -> None:
        super().__init__()
        self.read, self.see = nn.Embedding(32, 6), nn.Conv2d(3, 6, 4, self.side)

    def features(self, pixels: Tensor) -> Tensor:
        return self.see(pixels.flatten(0, -4)).flatten(2).mT.reshape(-1, 6)

    def joined(self, ids: Tensor, features: Tensor) -> Tensor:
        mask = ids == 9
        torch._check(int(mask.sum()) == len(features))
        return self.read(ids).masked_scatter(mask.unsqueeze(-1), features)


class Asked(Sees):
    """The method of features wants to know which crops are no padding, as ``forward`` may be told."""

    def get_image_features(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        if pixel_attention_mask.dtype != torch.bool:
            raise ValueError("a mask of crops")
        return self.features(pixel_values[pixel_attention_mask])

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, pixel_attention_mask: Tensor | None = None
    ) -> Tensor:
        if pixel_values is None or pixel_attention_mask is None:
            return self.read(input_ids)
        return self.joined(input_ids, self.get_image_features(pixel_values, pixel_attention_mask))


def test_what_the_method_of_features_cannot_do_without_is_given() -> None:
    model = Asked()
    assert needed(Facts(model), "pixel_values") == ["pixel_attention_mask"]
    inputs = accepted(model)
    assert inputs["pixel_values"].shape == (2, 2, 3, 8, 8)
    assert inputs["pixel_attention_mask"].dtype == torch.bool
    assert (inputs["input_ids"] == 9).sum(1).tolist() == [8, 8]


class OnTheWay(Sees):
    """The method wants what ``forward`` works out."""

    def get_image_features(self, pixel_values: Tensor, gain: float) -> Tensor:
        return gain * self.features(pixel_values)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.joined(input_ids, self.get_image_features(pixel_values, 2.0))


class WithoutMethod(Sees):
    """What a projector gives are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.multi_modal_projector = nn.Linear(6, 6)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.joined(input_ids, self.multi_modal_projector(self.features(pixel_values)))


@pytest.mark.parametrize("kind", [OnTheWay, WithoutMethod])
def test_features_are_counted_on_the_way(kind: type[Sees], capsys: pytest.CaptureFixture[str]) -> None:
    inputs = accepted(kind())
    assert (inputs["input_ids"] == 9).sum(1).tolist() == [4, 4]
    model = kind()
    before = dict(vars(model))
    assert feature_count(Facts(model), "pixel_values", inputs) == 8
    assert vars(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    assert capsys.readouterr() == ("", "")


class Unpooled(OnTheWay):
    """Features come as an output that leaves the pooled ones out."""

    def get_image_features(self, pixel_values: Tensor, gain: float = 1.0) -> Any:
        return SimpleNamespace(last_hidden_state=self.features(pixel_values), pooler_output=None)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.joined(input_ids, self.get_image_features(pixel_values).last_hidden_state)


def test_features_that_are_not_pooled_are_counted() -> None:
    assert (accepted(Unpooled())["input_ids"] == 9).sum(1).tolist() == [4, 4]


class Flat(Sees):
    """Takes flat patches, and reads a mask as long as its text."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Linear(3 * 4 * 4, 6)  # type: ignore[assignment]

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.see(pixel_values).reshape(-1, 6)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            raise ValueError("no mask")
        joined = self.joined(input_ids, self.get_image_features(pixel_values))
        return joined * attention_mask.unsqueeze(-1)


def test_patches_may_be_flat_and_the_mask_is_as_long_as_the_text_with_placeholders() -> None:
    inputs = accepted(Flat(), SimpleNamespace(image_token_id=9, image_size=8, patch_size=4))
    assert inputs["pixel_values"].shape == (2, 16, 48)
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape == (2, 7 + 16)


class Hears(nn.Module):
    """The decoder of a sound: text beside it is too much."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.hear = nn.Embedding(32, 6), nn.Linear(80, 6)

    def forward(
        self, input_ids: Tensor | None = None, input_features: Tensor | None = None, decoder_input_ids: Any = None
    ) -> Tensor:
        if input_ids is not None or input_features is None or decoder_input_ids is None:
            raise ValueError("a sound and the decoder's text")
        return self.read(decoder_input_ids) + self.hear(input_features).mean(1, keepdim=True)


def test_a_sound_is_given_without_the_text_that_is_in_its_place() -> None:
    assert set(accepted(Hears(), SimpleNamespace())) == {"input_features", "decoder_input_ids"}


class Windows(nn.Module):
    """Takes a spectrogram in windows of 2 · 5 frames."""

    def __init__(self) -> None:
        super().__init__()
        self.hear = nn.Conv1d(80, 6, 3)

    def forward(self, input_features: Tensor) -> Tensor:
        if input_features.shape[-1] % 10:
            raise ValueError("half a window")
        return self.hear(input_features)


def test_a_spectrogram_is_whole_windows_long() -> None:
    assert accepted(Windows(), SimpleNamespace(n_window=5))["input_features"].shape == (2, 80, 70)


class Linear(nn.Module):
    """Cuts images by a linear map, of two frames of 4 · 4, and has a convolution of another size behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.after = nn.Linear(2 * 3 * 16, 6), nn.Conv2d(6, 6, 3)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        return self.after(self.cut(pixel_values).mT.unflatten(-1, (8, -1)))


def test_a_convolution_of_another_size_does_not_cut_the_patches() -> None:
    inputs = accepted(Linear(), SimpleNamespace(patch_size=4))
    assert inputs["pixel_values"].shape == (32, 96)


def crops() -> nn.Module:
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
    points = [[56, 28], [28, 56], [56, 56]]
    sizes = {"image_token_index": 100, "image_grid_pinpoints": points}
    config = hf.LlavaNextConfig(vision_config=vision, text_config=text, **sizes)
    return hf.LlavaNextForConditionalGeneration(config)


def packed() -> nn.Module:
    vision = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}
    layers = {"layer_types": ["full_attention"], "num_hidden_layers": 1}
    text = hf.Lfm2Config(**{**TEXT, **layers})
    config = hf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=100)
    return hf.Lfm2VlForConditionalGeneration(config)


def sounds() -> nn.Module:
    audio = {
        **{"num_mel_bins": 20, "d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 3},
        **{"encoder_ffn_dim": 32, "max_source_positions": 40},
    }
    text = {"model_type": "qwen2", **TEXT}
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=100)
    return hf.Qwen2AudioForConditionalGeneration(config)


def grids() -> nn.Module:
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48},
        **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope, "num_hidden_layers": 2}
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=100)
    return hf.Qwen3VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "signal", "companion"),
    [
        (crops, "pixel_values", "image_sizes"),
        (packed, "pixel_values", "pixel_attention_mask"),
        (sounds, "input_features", "feature_attention_mask"),
        (grids, "pixel_values", "image_grid_thw"),
    ],
)
def test_every_tower_of_a_model_of_the_library_is_read(
    make: Callable[[], nn.Module], signal: str, companion: str
) -> None:
    with torch.device("meta"):
        model = make().eval()
    inputs = trace_inputs(model)
    assert {signal, companion, "input_ids"} <= inputs.keys()
    assert not trace(model, inputs).unreached.keys() & model.state_dict().keys() - {"image_newline"}
    assert not trace_model(model).unreached.keys() & model.state_dict().keys()
