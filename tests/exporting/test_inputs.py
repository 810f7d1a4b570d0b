"""Models of several inputs: as people call them, of any size that the model allows, with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.exporting.export import export
from tests.support.perturb import perturb

SMALL: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model: Any = perturb(BertForMaskedLM(BertConfig(**SMALL, **sizes, max_position_embeddings=40)))
    model.save_pretrained(folder := tmp_path_factory.mktemp("bert"))
    return folder


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "max_position_embeddings": 120}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    torch.manual_seed(0)
    model: Any = perturb(BartForConditionalGeneration(BartConfig(**SMALL, **sizes, decoder_start_token_id=2)))
    model.save_pretrained(folder := tmp_path_factory.mktemp("bart"))
    return folder


def _loaded(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kind = AutoModelForMaskedLM if AutoConfig.from_pretrained(folder).model_type == "bert" else AutoModelForSeq2SeqLM
    model: nn.Module = kind.from_pretrained(folder)
    return model.eval()


def _session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _texts(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Ids, a mask that leaves out the end of the first row, and token types."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length - length // 3 :] = 0
    ids = torch.randint(3, 61, (rows, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, (rows, length))}


def test_masks_and_token_types_are_inputs_and_the_longest_text_is_stated(bert: Path, tmp_path: Path) -> None:
    (one,) = export(bert, tmp_path / "model.onnx").files
    assert list(one.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert one.varies == {"batch": (1, None), "length": (1, 40)}
    session = _session(tmp_path / "model.onnx")
    assert [i.shape for i in session.get_inputs()] == [["batch", "length"]] * 3
    model = _loaded(bert)
    for rows, length in ((1, 1), (2, 40), (3, 9)):
        texts = _texts(rows, length)
        (found,) = session.run(None, {name: value.numpy() for name, value in texts.items()})
        with torch.no_grad():
            expected = model(**texts).logits
        assert (torch.from_numpy(found) - expected).norm() <= 1e-5 * expected.norm()


def test_a_program_takes_several_inputs_by_position(bert: Path, tmp_path: Path) -> None:
    (one,) = export(bert, tmp_path / "model.pt2", inputs=["input_ids", "attention_mask"]).files
    assert list(one.inputs) == ["input_ids", "attention_mask"]
    module = torch.export.load(tmp_path / "model.pt2").module()
    texts = _texts(2, 33)
    with torch.no_grad():
        expected = _loaded(bert)(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).logits
        assert torch.allclose(module(texts["input_ids"], texts["attention_mask"])[0], expected, atol=1e-5)


@pytest.mark.slow
def test_two_texts_have_lengths_of_their_own(bart: Path, tmp_path: Path) -> None:
    (one,) = export(bart, tmp_path / "model.onnx").files
    assert one.inputs["decoder_input_ids"] == ["batch", "decoder_length"]
    texts = _texts(2, 11)
    del texts["token_type_ids"]
    texts["decoder_input_ids"] = torch.randint(3, 61, (2, 4))
    found = _session(tmp_path / "model.onnx").run(["logits"], {name: value.numpy() for name, value in texts.items()})[0]
    with torch.no_grad():
        expected = _loaded(bart)(**texts).logits
    assert (torch.from_numpy(found) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 99}, "unknown opset 99; expected 18 to 23"),
        ({"inputs": ["pixel_values"]}, "no input 'pixel_values'; forward takes input_ids, "),
        ({"target": "abacus"}, "unknown target 'abacus'"),
        ({"with_past": True}, "keeps none|keys and values of each layer"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    bert: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(Exception, match=words) as refused:
        export(bert, tmp_path / "model.onnx", **options)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as refused:
        export(tmp_path / "empty", tmp_path / "model.onnx")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_an_encoder_and_a_decoder_write_the_text_that_torch_writes(bart: Path, tmp_path: Path) -> None:
    report = export(bart, tmp_path / "folder")
    names = ["encoder_model", "decoder_model", "decoder_with_past_model"]
    assert [Path(one.file).stem for one in report.files] == names
    encoder, decoder, later = (_session(Path(one.file)) for one in report.files)
    texts = {name: value.numpy() for name, value in _texts(1, 9).items() if name != "token_type_ids"}
    (states,) = encoder.run(None, texts)
    ids = torch.full((1, 1), 2)
    given = {
        "input_ids": ids.numpy(),
        "encoder_hidden_states": states,
        "encoder_attention_mask": texts["attention_mask"],
    }
    found = dict(zip(report.files[1].outputs, decoder.run(None, given), strict=True))
    past = {name.replace("present", "past_key_values"): v for name, v in found.items() if name != "logits"}
    wanted = [i.name for i in later.get_inputs()]
    for _ in range(100):
        ids = torch.cat([ids, torch.from_numpy(found["logits"])[:, -1:].argmax(-1)], 1)
        given = {**past, "input_ids": ids[:, -1:].numpy(), "encoder_attention_mask": texts["attention_mask"]}
        found = dict(zip(report.files[2].outputs, later.run(None, {n: given[n] for n in wanted}), strict=True))
        past |= {name.replace("present", "past_key_values"): v for name, v in found.items() if name != "logits"}
    model: Any = _loaded(bart)
    expected = torch.full((1, 1), 2)
    inputs = {name: torch.from_numpy(value) for name, value in texts.items()}
    with torch.no_grad():
        for _ in range(100):
            logits = model(**inputs, decoder_input_ids=expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert len(set(expected[0].tolist())) > 1
    assert torch.equal(ids, expected)
    with torch.no_grad():
        known = model(**inputs, decoder_input_ids=expected, use_cache=False).logits[:, -1]
    assert (torch.from_numpy(found["logits"])[:, -1] - known).norm() <= 1e-5 * known.norm()
