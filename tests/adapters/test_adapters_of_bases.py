"""Adapters follow a change of basis: orthogonal maps act on a LoRA's factors and on prompts, numbers on one factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import normconvert
from normconvert.adapters.conversion import convert_adapter
from normconvert.errors import InputError
from tests.adapters.test_adapters import check, lora
from tests.support.adapters import float64_checkpoint, train
from tests.support.tiny_checkpoints import gpt2

peft = pytest.importorskip("peft")

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotate": ("rotate", {"values": True, "rotation": "random"}), "scale": ("scale", {"power": "3"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float64_checkpoint(gpt2(), tmp_path_factory.mktemp("bases") / "gpt2")


@pytest.fixture(scope="module")
def conversions(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("converted")
    for name, (method, options) in WAYS.items():
        normconvert.convert(original, where / name, method, verify=False, **options)
    return {name: where / name for name in WAYS}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    "config",
    [
        lora("c_proj", "c_attn", "c_fc", lora_bias=True),
        pytest.param(lora("wte", "wpe", "c_attn", bias="all"), marks=pytest.mark.slow),
        pytest.param(lora("c_attn", modules_to_save=["mlp"]), marks=pytest.mark.slow),
    ],
    ids=["maps", "tables", "whole"],
)
def test_lora_follows(original: Path, conversions: dict[str, Path], way: str, config: Any, tmp_path: Path) -> None:
    check(original, conversions[way], config, tmp_path)


@pytest.mark.slow
def test_dora_takes_a_number_and_no_rotation(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    dora = lora("mlp.c_proj", use_dora=True)
    check(original, conversions["scale"], dora, tmp_path / "scale")
    adapter = train(original, tmp_path / "adapter", dora)
    with pytest.raises(InputError, match=r"DoRA scales the rows of a weight .*rotate"):
        convert_adapter(adapter, tmp_path / "out", conversions["rotate"], source=original)


@pytest.mark.parametrize("way", ["rotate", pytest.param("scale", marks=pytest.mark.slow)])
def test_prompts_follow(original: Path, conversions: dict[str, Path], way: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    check(original, conversions[way], config, tmp_path, limit=1e-6)  # PEFT keeps prompts in float32


def test_a_prefix_of_values_does_not_fit_rotated_ones(
    original: Path, conversions: dict[str, Path], tmp_path: Path
) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapter = train(original, tmp_path / "adapter", config)
    with pytest.raises(InputError, match="--values"):
        convert_adapter(adapter, tmp_path / "out", conversions["rotate"], source=original)
    assert not (tmp_path / "out").exists()
