"""Models that are built and loaded by several threads at once are those that one thread gets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

import normconvert
from normconvert.sources.converted import load_opened, open_any
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import VIT_ARGUMENTS, gpt2, save_vit, vit

TEXT: dict[str, Any] = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, intermediate_size=64)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, intermediate_size=64)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**TEXT, ffn_dim=64, word_embed_proj_dim=48)),
    "vit": vit,
    "resnet": lambda: timm.create_model("test_resnet", num_classes=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, make in MODELS.items():
        folder, model = tmp_path_factory.mktemp("threads") / name, perturb(make().eval())
        if name in ("vit", "resnet"):
            save_vit(model, folder, VIT_ARGUMENTS if name == "vit" else {"num_classes": 3})
        else:
            saver: Any = model
            saver.save_pretrained(folder)
        found[name] = folder
    normconvert.convert(found["gpt2"], found["gpt2"].with_name("converted"), verify=False)
    return {**found, "converted": found["gpt2"].with_name("converted")}


def state(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and all buffers, those that no file holds too."""
    model = load_opened(open_any(folder), dtype=dtype)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_models_that_three_threads_load_are_what_one_loads(folders: dict[str, Path]) -> None:
    jobs = [(folder, dtype) for folder in folders.values() for dtype in (torch.float32, torch.float64)]
    alone = [state(*job) for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda job: state(*job), jobs))
    for job, expected, found in zip(jobs, alone, together, strict=True):
        assert list(expected) == list(found), job
        wrong = [n for n, v in expected.items() if v.dtype != found[n].dtype or not torch.equal(v, found[n])]
        assert not wrong, (job, wrong[:4])
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_conversions_beside_each_other_are_those_made_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    def convert(name: str, where: str) -> bytes:
        out = tmp_path / where / name
        normconvert.convert(folders[name], out, "fuse-bn" if name == "resnet" else "rmsnorm")
        return (out / "model.safetensors").read_bytes()

    for where in ("alone", "together"):
        (tmp_path / where).mkdir()
    names = ["gpt2", "vit", "resnet"]
    alone = [convert(name, "alone") for name in names]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda name: convert(name, "together"), names)) == alone
