"""Inputs: they trace every kind of model, and the probes are what they promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from normconvert.errors import TraceError
from normconvert.tracing.calls import without_values
from normconvert.tracing.probes import Probe, trace_inputs, trace_inputs_candidates, verification_inputs

TEXT = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
VISION = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 28, "patch_size": 7}
SEQ2SEQ = {
    **{"vocab_size": 101, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3},
    **{"decoder_attention_heads": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
}
AUDIO = {
    **{"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64, "vocab_size": 33},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 3},
}


def gpt2(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 40, **options}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=100)
    return hf.LlavaForConditionalGeneration(config)


def clip() -> nn.Module:
    config = hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    return hf.CLIPModel(config)


def whisper() -> nn.Module:
    sizes = {**SEQ2SEQ, "num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 40, "pad_token_id": 0}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes))


# name, model, arguments that the trace must use, with the shapes that the model demands (None: any)
CASES: list[tuple[str, Callable[[], nn.Module], dict[str, tuple[int, ...] | None]]] = [
    ("causal", gpt2, {"input_ids": (2, 7)}),
    ("masked", lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), {"input_ids": (2, 7)}),
    ("head-without-padding", lambda: hf.GPT2ForSequenceClassification(gpt2(n_layer=1).config), {"input_ids": None}),
    ("seq2seq", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)), {"decoder_input_ids": (2, 5)}),
    ("image", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"pixel_values": (2, 3, 28, 28)}),
    ("free-size", lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig()), {"pixel_values": None}),
    ("dual", clip, {"input_ids": (2, 7), "pixel_values": (2, 3, 28, 28)}),
    ("image-text", llava, {"input_ids": (2, 7 + 16), "pixel_values": (2, 3, 28, 28)}),
    ("spectrogram", whisper, {"input_features": (2, 20, 60), "decoder_input_ids": (2, 5)}),
    ("waveform", lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**AUDIO)), {"input_values": None}),
    (
        "video",
        lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VISION, num_frames=4)),
        {"pixel_values": (2, 4, 3, 28, 28)},
    ),
    ("timm", lambda: timm.create_model("vit_tiny_patch16_224", depth=1), {"x": (2, 3, 224, 224)}),
    ("timm-img-size", lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=48), {"x": (2, 3, 48, 48)}),
    ("timm-naflex", lambda: timm.create_model("naflexvit_base_patch16_gap", depth=1), {"x": None}),
    ("timm-one-channel", lambda: timm.create_model("resnet18", in_chans=1), {"x": (2, 1, 224, 224)}),
]


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_inputs_trace_every_kind_of_model(
    make: Callable[[], nn.Module], expected: dict[str, tuple[int, ...] | None]
) -> None:
    model = on_meta(make)
    inputs = trace_inputs(model)
    for name, shape in expected.items():
        assert name in inputs
        assert shape is None or tuple(inputs[name].shape) == shape
    assert not any(value.is_meta for value in inputs.values() if isinstance(value, Tensor))
    with torch.no_grad():
        program = torch.export.export(model, (), without_values(inputs), strict=False)
    outputs = [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    assert 0 < len(outputs) < 10  # a cache would add a key and a value for every layer


def test_every_tower_of_a_multimodal_model_is_traced() -> None:
    model = on_meta(llava)
    with torch.no_grad():
        program = torch.export.export(model, (), without_values(trace_inputs(model)), strict=False)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = program.graph_signature.inputs_to_parameters.items()
    used = {name for node, name in names if placeholders[node].users}
    assert any("vision" in name for name in used)
    assert any("language" in name for name in used)


def test_cache_is_switched_off_where_forward_cannot_say_so() -> None:
    model = on_meta(llava)
    assert "use_cache" not in trace_inputs(model)
    assert model.config.text_config.use_cache is False  # type: ignore[union-attr]


class Wide(nn.Module):
    """Takes images of at least 256 pixels only, and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 256)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values)


def test_other_sizes_are_tried_when_the_first_guess_fails() -> None:
    model = on_meta(Wide)
    assert trace_inputs(model)["pixel_values"].shape[-1] >= 256
    assert all(inputs["pixel_values"].shape[-1] >= 256 for inputs in trace_inputs_candidates(model))


class Pairs(nn.Module):
    """Takes two images at once, and says the same of every other input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 5:
            raise ValueError("two images are needed")
        return self.conv(pixel_values.flatten(0, 1))


def test_layouts_are_tried_though_the_error_stays_the_same_at_other_sizes() -> None:
    assert trace_inputs(on_meta(Pairs))["pixel_values"].ndim == 5


def forecaster(**options: Any) -> nn.Module:
    sizes = {"prediction_length": 4, "context_length": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    return hf.TimeSeriesTransformerModel(hf.TimeSeriesTransformerConfig(**sizes, **options))


def test_features_that_a_series_does_not_have_are_left_out() -> None:
    assert "static_categorical_features" not in trace_inputs(on_meta(forecaster))
    counted = {"num_static_categorical_features": 1, "cardinality": [3], "embedding_dimension": [2]}
    assert trace_inputs(on_meta(lambda: forecaster(**counted)))["static_categorical_features"].shape == (2, 1)


class Odd(nn.Module):
    def forward(self, wavelets: Tensor) -> Tensor:
        return wavelets


def test_unknown_argument_is_named() -> None:
    with pytest.raises(TraceError, match="'wavelets'"):
        trace_inputs(Odd())


def inputs_of(probes: list[Probe], name: str) -> dict[str, Any]:
    return next(probe.inputs for probe in probes if probe.name == name)


def test_probes_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    model = gpt2()
    first, again, other = (verification_inputs(model, seed=s) for s in (3, 3, 4))
    assert [p.name for p in first] == [p.name for p in again]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(v, b.inputs[k]) for k, v in a.inputs.items() if isinstance(v, Tensor))
    assert not torch.equal(inputs_of(first, "random")["input_ids"], inputs_of(other, "random")["input_ids"])


def test_text_probes_are_few_short_and_within_the_vocabulary() -> None:
    probes = [p for p in verification_inputs(gpt2(n_positions=20)) if "input_ids" in p.inputs]
    assert 6 <= len(probes) <= 10
    for probe in probes:
        ids = probe.inputs["input_ids"]
        assert ids.shape[1] <= 20
        assert 0 <= int(ids.min()) <= int(ids.max()) < 101
    assert len({tuple(p.inputs["input_ids"].shape) for p in probes}) >= 4  # several lengths and batch sizes


def test_degenerate_rows_hold_one_id_each() -> None:
    ids = inputs_of(verification_inputs(gpt2()), "degenerate")["input_ids"]
    assert [row.unique().numel() for row in ids] == [1, 1, 1]
    assert {0, 100} <= set(ids.flatten().tolist())


def test_padding_masks_both_sides() -> None:
    probes = verification_inputs(gpt2())
    right, left = (inputs_of(probes, f"padded-{side}")["attention_mask"][0] for side in ("right", "left"))
    assert (right[0], right[-1]) == (1, 0)
    assert (left[0], left[-1]) == (0, 1)


def test_image_probes_vary_the_scale() -> None:
    probes = verification_inputs(hf.ViTModel(hf.ViTConfig(**VISION)))
    assert len(probes) >= 6
    scale = {probe.name: float(probe.inputs["pixel_values"].abs().max()) for probe in probes}
    assert scale["zero"] == 0.0
    assert scale["large"] > 50.0 > 1.0 > scale["small"]


def test_probes_run_on_the_cpu() -> None:
    for make in (gpt2, clip, llava, whisper):
        model = make().eval()
        probes = verification_inputs(model)
        assert len(probes) >= 5
        for probe in probes:
            with torch.no_grad():
                assert len(model(**probe.inputs)) > 0, probe.name


def test_placeholders_keep_their_count_in_degenerate_text() -> None:
    for probe in [p for p in verification_inputs(llava()) if "input_ids" in p.inputs]:
        ids, images = probe.inputs["input_ids"], probe.inputs["pixel_values"]
        assert int((ids == 100).sum()) == 16 * len(images)


class Words:
    """A tokenizer for tests: the bytes of the text."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [byte % 101 for byte in text.encode()]}


def test_a_classifier_of_texts_finds_the_end_of_each_one() -> None:
    """It reads what stands at the end of the text, which all texts of a batch must have as often."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=64, **sizes, **heads)
    model = hf.BartForSequenceClassification(config).eval()
    probes = verification_inputs(model, level="thorough")
    assert "decoder_input_ids" not in trace_inputs(model)
    assert len(probes) > 3
    for probe in probes:
        if "input_ids" in probe.inputs:
            assert (probe.inputs["input_ids"] == config.eos_token_id).sum(1).tolist() == [1] * len(
                probe.inputs["input_ids"]
            )
            model(**probe.inputs)


def test_a_placeholder_that_the_vocabulary_lacks_makes_no_id_larger() -> None:
    with torch.device("meta"):
        vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=100)
        model = hf.LlavaForConditionalGeneration(config).eval()
    model.config.video_token_id = 5000  # of a default configuration, and nothing gives a video
    assert all(int(probe.inputs["input_ids"].max()) < 101 for probe in verification_inputs(model) if text_of(probe))


def text_of(probe: Probe) -> bool:
    return "input_ids" in probe.inputs


def test_sentences_go_through_the_tokenizer() -> None:
    probes = [p for p in verification_inputs(gpt2(), tokenizer=Words()) if p.name.startswith("text")]
    assert len(probes) == 2
    assert all(p.inputs["input_ids"].shape == (1, 32) for p in probes)
    assert probes[0].inputs["input_ids"][0, 0] == ord("T") % 101


class Mute:
    """A tokenizer whose vocabulary knows no word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


HOPELESS = "(([a-z ])+.)+[A-Z]([a-z ])+$"


@pytest.mark.parametrize(
    "part",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": HOPELESS}, "behavior": "Isolated", "invert": False}},
    ],
    ids=["error", "panic"],
)
def test_a_tokenizer_that_fails_on_every_text_gives_no_text_probes(part: dict[str, Any]) -> None:
    """A panic in the library's Rust is no Exception of Python's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole | part)))
    names = [p.name for p in verification_inputs(gpt2(), tokenizer=tokenizer)]
    assert names
    assert not [name for name in names if name.startswith("text")]


def test_a_tokenizer_that_knows_no_word_gives_no_text_probes() -> None:
    names = [p.name for p in verification_inputs(gpt2(), tokenizer=Mute())]
    assert names == [p.name for p in verification_inputs(gpt2())]


def test_a_size_in_a_configuration_that_nothing_holds_is_not_tried() -> None:
    sizes = {"hidden_sizes": [16, 16], "depths": [1, 1], "num_stages": 2}
    model = hf.ConvNextModel(hf.ConvNextConfig(image_size=30_000, **sizes))
    assert trace_inputs(model)["pixel_values"].shape[-1] == 224
    settings = {"prediction_length": 4, "context_length": 8, "d_model": 16, "lags_sequence": [1, 2, 10**9]}
    with pytest.raises(TraceError, match="asks for an input of 2000000016 numbers"):
        trace_inputs(hf.TimeSeriesTransformerModel(hf.TimeSeriesTransformerConfig(**settings)))
