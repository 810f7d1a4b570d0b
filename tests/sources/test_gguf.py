"""GGUF, as transformers reads it: the same model, and a refusal wherever not all of the file would be in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.sources import open_source
from tests.support.equivalence import distance
from tests.support.perturb import perturb

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

IDS = torch.arange(12).reshape(2, 6)
Q8 = gguf.GGMLQuantizationType.Q8_0


def gpt2() -> Any:
    """Of 1,024 positions, which transformers takes for granted in a GGUF of this kind."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=101, n_embd=64, n_layer=2, n_head=4)
    return perturb(transformers.GPT2LMHeadModel(config)).eval()


def write_gpt2(path: Path, model: Any, kind: Any = None, say: Any = None, **extra: torch.Tensor) -> Path:
    """A GPT-2 as llama.cpp's converter writes it; matrices as ``kind``; ``say`` is called with the writer."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "gpt2")
    if say is not None:
        say(writer)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    state = {n: v for n, v in model.state_dict().items() if n != "lm_head.weight"} | extra
    for name, value in state.items():
        base, _, part = name.rpartition(".")
        turned = base.endswith(("c_attn", "c_proj", "c_fc")) and part == "weight"
        array = (value.T if turned else value).contiguous().float().numpy()
        known = names.get_name(base)
        target = f"{known}.{part}" if known else name
        if kind is not None and array.ndim == 2 and array.shape[-1] % 32 == 0:
            writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_is_the_model_that_it_was_written_from(tmp_path: Path) -> None:
    model = gpt2()
    source = open_source(str(write_gpt2(tmp_path / "tiny.gguf", model)))
    assert "read from a GGUF by transformers and widened to float32" in source.notes[0]
    assert distance(source.load(dtype=torch.float64)(IDS).logits, model.double()(IDS).logits) < 1e-6


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_quantised_gguf_converts_as_what_it_computes(tmp_path: Path, what: str) -> None:
    (tmp_path / "src").mkdir()
    path = write_gpt2(tmp_path / "src/tiny.gguf", gpt2(), Q8)
    src = path if what == "file" else path.parent
    report = normconvert.convert(src, tmp_path / "out")
    assert any("dequantised to float32 (Q8_0)" in note for note in report.notes)
    before: Any = open_source(str(src)).load(dtype=torch.float64)
    after: Any = normconvert.load(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():
        assert distance(before(IDS).logits, after(IDS).logits) < 1e-5  # written as float32


def test_values_that_transformers_leaves_out_are_not_left_out_in_silence(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "tiny.gguf", gpt2(), **{"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(InputError, match=r"the file holds \d+ \(rope_freqs\.weight is one that it leaves out\)"):
        open_source(str(path))


def test_several_are_no_choice_of_ours(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"2 GGUF files, a\.gguf, b\.gguf: pass one of them"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("cut", [0, 3, 40, 700, 5000])
def test_a_damaged_one_is_one_line(tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gpt2(tmp_path / "tiny.gguf", gpt2())
    path.write_bytes(path.read_bytes()[:cut])
    assert run(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {path}: not a GGUF file or damaged: ")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gpt2(tmp_path / "tiny.gguf", gpt2())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"to read GGUF, gguf is needed: pip install 'normconvert\[gguf\]'"):
        open_source(str(path))


def test_an_architecture_beside_it_is_refused(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "tiny.gguf", gpt2())
    with pytest.raises(InputError, match="a GGUF says itself what it is: leave --arch out"):
        open_source(str(path), arch="timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("say", "key"),
    [
        (lambda writer: writer.add_rope_scaling_factor(4.0), "gpt2.rope.scaling.factor"),
        (lambda writer: writer.add_logit_scale(0.5), "gpt2.logit_scale"),
        (lambda writer: writer.add_sliding_window(4), "gpt2.attention.sliding_window"),
        (lambda writer: writer.add_rope_dimension_count(8), "gpt2.rope.dimension_count"),
    ],
)
def test_what_transformers_passes_over_is_refused_by_name(tmp_path: Path, say: Any, key: str) -> None:
    with pytest.raises(InputError, match=rf"transformers reads nothing of {key}, which says how the model computes"):
        open_source(str(write_gpt2(tmp_path / "tiny.gguf", gpt2(), say=say)))


def test_what_says_nothing_more_is_no_obstacle(tmp_path: Path) -> None:
    def say(writer: Any) -> None:
        writer.add_vocab_size(101)
        writer.add_key_length(16)
        writer.add_rope_dimension_count(16)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    assert open_source(str(write_gpt2(tmp_path / "tiny.gguf", gpt2(), say=say))).library == "transformers"
