"""A small file costs little: sizes in a configuration are held against the weights before anything is made."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from normconvert.errors import InputError
from normconvert.sources import open_source
from tests.support.tiny_checkpoints import VIT_ARGUMENTS, gpt2, save, save_vit, vit


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt2(), tmp_path_factory.mktemp("sizes") / "gpt2")


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_layer": 900_000},
        {"num_labels": 10**9},
        {"n_head": 10**12},
        {"n_embd": 10**9},
        {"vocab_size": 10**15},
        {"n_layer": 1e300},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"n_inner": 10**12},
        {"architectures": None, "n_layer": 900_000},
    ],
    ids=str,
)
def test_a_config_out_of_proportion_is_refused_at_once(language: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = {**json.loads((language / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((language / "model.safetensors").read_bytes())
    start = time.process_time()
    with pytest.raises(InputError):
        open_source(str(tmp_path)).skeleton()
    assert time.process_time() - start < 10


@pytest.mark.parametrize("arguments", [{"depth": 10**9}, {"depth": 900_000}, {"embed_dim": 300_000}], ids=str)
def test_so_is_one_of_timm(tmp_path: Path, arguments: dict[str, Any]) -> None:
    folder = save_vit(vit(), tmp_path / "vit", VIT_ARGUMENTS)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {**config.get("model_args", {}), **arguments}
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(InputError):
        open_source(str(folder)).skeleton()
    assert time.process_time() - start < 10


def _tables() -> list[Any]:
    import transformers as hf

    text: dict[str, Any] = {"vocab_size": 101, "d_model": 16, "attention_heads": 2, "ffn_dim": 16}
    video: dict[str, Any] = {"image_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    both: dict[str, Any] = {
        "vocab_size": 101, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    return [
        (hf.XGLMForCausalLM(hf.XGLMConfig(num_layers=1, **text)), {"max_position_embeddings": 10**9}),
        (hf.M2M100Model(hf.M2M100Config(**both)), {"max_position_embeddings": 10**8}),
        (hf.VideoMAEModel(hf.VideoMAEConfig(num_hidden_layers=1, num_frames=4, **video)), {"num_frames": 900_000}),
    ]


@pytest.mark.parametrize("number", range(3), ids=["decoder", "both", "frames"])
def test_tables_that_no_file_holds_are_in_proportion_too(tmp_path: Path, number: int) -> None:
    model, change = _tables()[number]
    folder = save(model, tmp_path / "src")
    open_source(str(folder)).skeleton()
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(InputError, match=r"config\.json s"):
        open_source(str(folder)).skeleton()
    assert time.process_time() - start < 10


def test_what_transformers_finds_wrong_is_said_whole(language: Path, tmp_path: Path) -> None:
    config = {**json.loads((language / "config.json").read_text()), "layer_norm_epsilon": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((language / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"config\.json is not valid: .*layer_norm_epsilon.* expected float, got str"):
        open_source(str(tmp_path))
