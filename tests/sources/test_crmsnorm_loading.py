"""A compressed checkpoint loads where it is meant to, does what the original does, and nowhere else by mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from normconvert import convert, load, verify
from normconvert.apply import blocks as apply_blocks
from normconvert.apply import writer as apply_write
from normconvert.cli import run
from normconvert.plan import edits
from normconvert.runtime import CRMSNorm
from normconvert.sources import open_source
from tests.support.equivalence import distance
from tests.support.tiny_checkpoints import GPT2_SIZES, gpt2, save, save_vit, vit, with_tokenizer

TOLERANCE = 1e-5  # float32


@pytest.fixture(scope="module", autouse=True)
def _module_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Remote code is copied to a cache before it runs; not into the user's."""
    from transformers import dynamic_module_utils

    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A GPT-2 and the folder it was converted into."""
    folder = tmp_path_factory.mktemp("text")
    original = gpt2()
    report = convert(save(original, folder / "src"), folder / "out", "crmsnorm", require_all=True)
    assert report.fidelity is not None
    assert report.fidelity.algebra <= 1e-10
    return original, folder / "out"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, GPT2_SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))


def remote(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


LOADERS: dict[str, Callable[..., Any]] = {"load": load, "remote": remote}


def norms(model: Any) -> set[str]:
    return {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}


@pytest.mark.parametrize("loader", list(LOADERS))
def test_it_loads_generates_and_runs_in_batches(text: tuple[Any, Path], ids: Tensor, loader: str) -> None:
    original, folder = text
    model = LOADERS[loader](folder)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert norms(model) == {"CRMSNorm"}
    assert model.transformer.wte.weight.shape == (101, 47)
    assert model.lm_head.weight.shape == (101, 47)
    assert model.lm_head.weight is not model.transformer.wte.weight
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        truth = original(ids, attention_mask=mask).logits[mask.bool()]
        assert distance(model(ids, attention_mask=mask).logits[mask.bool()], truth) < TOLERANCE
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert {h.shape[-1] for h in hidden} == {47}
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    for cache in (True, False):
        generated = model.generate(ids, use_cache=cache, **options)
        assert torch.equal(generated, original.generate(ids, use_cache=True, **options))


@pytest.mark.parametrize("loader", list(LOADERS))
def test_it_is_saved_and_loaded_again(text: tuple[Any, Path], ids: Tensor, loader: str, tmp_path: Path) -> None:
    original, folder = text
    model = LOADERS[loader](folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    LOADERS[loader](folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    for again in (load(tmp_path / "again"), remote(tmp_path / "again")):
        assert norms(again) == {"CRMSNorm"}
        with torch.no_grad():
            assert distance(again(ids).logits, original(ids).logits) < TOLERANCE


def test_a_pipeline_takes_it(text: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import pipeline

    folder = with_tokenizer(text[1], tmp_path / "piped", pad_token="w0")
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    assert norms(pipe.model) == {"CRMSNorm"}
    for said in pipe(["w3 w4", "w5"], max_new_tokens=3, batch_size=2):
        assert said[0]["generated_text"].startswith("w")


def test_unmodified_transformers_refuses_it(text: tuple[Any, Path]) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

    _, folder = text
    for kind in (GPT2LMHeadModel, AutoModelForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(folder)


def test_another_head_refuses_it_with_what_to_do(text: tuple[Any, Path]) -> None:
    """The last norm has moved into the head: the base model alone would give something else."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    _, folder = text
    base: Any = get_class_from_dynamic_module("modeling_normconvert.GPT2Model", folder, local_files_only=True)
    with pytest.raises(ValueError, match="converted as GPT2LMHeadModel and cannot be loaded as GPT2Model"):
        base.from_pretrained(folder, config=AutoConfig.from_pretrained(folder, trust_remote_code=True))
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map.values()) == {"modeling_normconvert.GPT2LMHeadModel"}


def test_the_card_says_how_it_loads(text: tuple[Any, Path]) -> None:
    card = (text[1] / "README.md").read_text()
    assert "normconvert.load" in card
    assert "trust_remote_code=True" in card
    assert "# the original architecture" not in card
    assert "Unmodified transformers cannot load it" in card
    assert "no longer tied" in card


@pytest.mark.parametrize("basis", ["isometric", "paper"])
def test_timm_loads_by_normconvert_and_timm_refuses_it(tmp_path: Path, basis: str) -> None:
    import timm

    original = vit()
    source = save_vit(original, tmp_path / "src")
    report = convert(source, tmp_path / "out", "crmsnorm", basis=basis, require_all=True)
    assert report.fidelity is not None
    assert report.fidelity.algebra <= 1e-10
    model = load(tmp_path / "out")
    assert norms(model) == {"CRMSNorm"}
    assert {m.basis for m in model.modules() if isinstance(m, CRMSNorm)} == {basis}
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert distance(model(image), original(image)) < TOLERANCE
    with pytest.raises(RuntimeError, match="191"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert verify(source, tmp_path / "out").passed


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_files_are_edited_in_blocks_as_in_memory(
    text: tuple[Any, Path], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded files and pickles, by small blocks of rows and columns, give the bytes of whole tensors."""
    monkeypatch.setattr(apply_blocks, "BLOCK", 97)
    monkeypatch.setattr(apply_write, "PIECE", 97)
    monkeypatch.setattr(edits, "BLOCK", 97)
    convert(save(text[0], tmp_path / "src", form), tmp_path / "out", "crmsnorm", verify=False)
    whole = load_file(text[1] / "model.safetensors")
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, value in load_file(file).items():
            torch.testing.assert_close(value, whole.pop(name), rtol=1e-6, atol=1e-7)
    assert not whole
    assert open_source(str(tmp_path / "out")).load().state_dict().keys() == load(text[1]).state_dict().keys()


def test_tied_center_keeps_one_table_and_compresses_its_output(tmp_path: Path, ids: Tensor) -> None:
    original = gpt2()
    report = convert(save(original, tmp_path / "src"), tmp_path / "out", "crmsnorm", tied="center", require_all=True)
    inserted = [edit for edit in report.plan.modules if edit["op"] == "compress"]
    assert [(edit["path"], edit["side"]) for edit in inserted] == [
        ("transformer.h.0", "input")
    ]  # GPT-2 gives its last norm the shape of what the blocks read
    model: Any = remote(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.ln_f.expand
    with torch.no_grad():
        assert distance(model(ids).logits, original(ids).logits) < TOLERANCE


def test_the_demo_says_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, to the words that come out."""
    from normconvert.demos.run import continue_text

    out = tmp_path / "out"
    assert run(["crmsnorm", "demo:gpt2", str(out), "--require-all", "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert "9 of 9 LayerNorm → CRMSNorm" in shown
    assert "how" not in shown
    fidelity = json.loads((tmp_path / "report.json").read_text())["fidelity"]
    assert fidelity["algebra"] <= 1e-10
    assert fidelity["rounding"] <= 2
    said = continue_text(out, tokens=40)
    assert said.same
    assert run(["verify", "demo:gpt2", str(out)]) == 0


def test_inspect_for_crmsnorm(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "demo:gpt2", "--for", "crmsnorm", "--basis", "paper"]) == 0
    shown = capsys.readouterr().out
    assert "✓ LayerNorm → CRMSNorm" in shown
    assert "are no longer tied" in shown.replace("\n", " ")
