"""A checkpoint is converted as the class that it is of, and opened as another class it is right or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normconvert
from normconvert.errors import InputError
from normconvert.sources import open_source
from tests.support.equivalence import distance
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import GPT2_SIZES, gpt2, save

ABSENT = "absent"


def change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    return folder


# -- a config.json that names no class ------------------------------------------------------------------------------


@pytest.mark.parametrize("architectures", [ABSENT, None, [], [None], "", [""]])
def test_the_class_that_the_tensors_state_is_converted(tmp_path: Path, architectures: Any) -> None:
    from transformers import GPT2LMHeadModel

    model = gpt2().double()
    folder = change_config(save(model, tmp_path / "src"), architectures=architectures)
    source = open_source(str(folder))
    assert source.architecture == "GPT2LMHeadModel"
    assert any("tensors are those of GPT2LMHeadModel" in note for note in source.notes)
    report = normconvert.convert(folder, tmp_path / "out", verify=False)
    assert report.architecture == "GPT2LMHeadModel"
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        for found in (normconvert.load(tmp_path / "out"), GPT2LMHeadModel.from_pretrained(tmp_path / "out")):
            assert distance(found(ids).logits, model(ids).logits) < 1e-12


def other_models() -> dict[str, nn.Module]:
    from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50
    }  # fmt: skip
    vit = ViTConfig(image_size=16, patch_size=8, **sizes)
    untied = gpt2(tie_word_embeddings=False)
    return {
        "GPT2LMHeadModel": untied,
        "BertModel": BertModel(BertConfig(**sizes)),
        "ViTModel": ViTModel(vit),
        "ViTForImageClassification": ViTForImageClassification(vit),
    }


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertModel", "ViTModel", "ViTForImageClassification"])
def test_names_that_fit_one_class_decide(tmp_path: Path, name: str) -> None:
    folder = change_config(save(perturb(other_models()[name].eval()), tmp_path / "src"), architectures=None)
    assert open_source(str(folder)).architecture == name


def test_names_that_a_tied_head_would_not_add_to_are_refused(tmp_path: Path) -> None:
    """The first GPT-2 on the hub is a language model without a prefix, and a base model has the same names."""
    from transformers import GPT2Config, GPT2Model

    model = perturb(GPT2Model(GPT2Config(**GPT2_SIZES)).eval())
    folder = change_config(save(model, tmp_path / "src"), architectures=None)
    with pytest.raises(InputError, match=r"fit 2, which may compute differently: GPT2Model, GPT2LMHeadModel: write"):
        open_source(str(folder))
    assert open_source(str(change_config(folder, architectures=["GPT2Model"]))).architecture == "GPT2Model"


def test_a_head_of_nobody_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = change_config(save(gpt2(), tmp_path / "src"), architectures=None)
    tensors = load_file(folder / "model.safetensors") | {"mine.weight": torch.zeros(3, 48)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"fit none of .*GPT2LMHeadModel"):
        open_source(str(folder))


def test_an_output_names_its_class(tmp_path: Path) -> None:
    """Fused norms have no tensors left by which the class could be told."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = perturb(ResNetForImageClassification(config).eval())
    folder = change_config(save(model, tmp_path / "src"), architectures=None)
    normconvert.convert(folder, tmp_path / "out", method="fuse-bn", verify=False)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert distance(normconvert.load(tmp_path / "out")(image).logits, model(image).logits) < 1e-5


# -- opened as another class of the family --------------------------------------------------------------------------


def beit() -> nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        use_mean_pooling=True, out_indices=[1, 2, 3, 4], num_labels=3,
    )  # fmt: skip
    return perturb(BeitForImageClassification(config).eval())


@pytest.fixture(autouse=True)
def _module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code is copied to a cache before it runs; not into the user's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_a_class_that_returns_the_raw_stream_is_refused_and_named(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForImageClassification

    from normconvert import runtime

    model = beit()
    report = normconvert.convert(save(model, tmp_path / "src"), tmp_path / "out")
    assert report.converted
    assert set(report.plan.shifted_classes) == {"BeitModel", "BeitBackbone"}
    card = (tmp_path / "out" / "README.md").read_text()
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    # AutoBackbone itself asks the hub for a repository of the folder's name.
    assert auto_map["AutoBackbone"] == "modeling_normconvert.BeitBackbone"
    for auto, name in ((AutoModel, "BeitModel"), (runtime.BeitBackbone, "BeitBackbone")):
        with pytest.raises(ValueError, match=f"converted as BeitForImageClassification and cannot be loaded as {name}"):
            auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert f"not proved if opened as {name}" in card
        assert any(f"not proved if opened as {name}" in note for note in report.notes)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert distance(found(image).logits, model(image).logits) < 1e-5


def test_a_tied_head_on_a_converted_base_model_reads_the_table_as_it_was(tmp_path: Path) -> None:
    from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, GPT2Model

    model = perturb(GPT2Model(GPT2Config(**GPT2_SIZES)).eval())
    source = save(model, tmp_path / "src")
    report = normconvert.convert(source, tmp_path / "out", verify=False)
    # Centring stands behind the sum of the embeddings, so that the table, which a tied head reads, is as it was.
    assert not any("wte" in name for name in report.plan.tensors)
    assert report.plan.shifted_classes == {}
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)(ids).last_hidden_state
        assert distance(found, model(ids).last_hidden_state) < 1e-5
        heads: list[Any] = [GPT2LMHeadModel.from_pretrained(folder).eval() for folder in (tmp_path / "out", source)]
        assert distance(heads[0](ids).logits, heads[1](ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_a_base_model_that_is_proved_opens_as_converted(tmp_path: Path, name: str) -> None:
    """A table that is tied to a head stays as it is for the base model, too; a pooler of its own reads a norm."""
    from transformers import AutoModel

    model: Any = gpt2() if name == "gpt2" else perturb(other_models()["ViTForImageClassification"].eval())
    report = normconvert.convert(save(model, tmp_path / "src"), tmp_path / "out", verify=False)
    base = model.base_model
    assert report.plan.classes == [type(base).__name__]
    inputs = torch.arange(12).reshape(2, 6) if name == "gpt2" else torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert any("RMSNorm" in type(module).__name__ for module in found.modules())
        assert distance(found(inputs).last_hidden_state, base(inputs).last_hidden_state) < 1e-5


# -- saved again ----------------------------------------------------------------------------------------------------


def train(model: Any, steps: int = 3) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@pytest.mark.parametrize("opened", ["load", "remote"])
def test_a_model_that_was_trained_is_the_same_after_it_was_saved(tmp_path: Path, opened: str) -> None:
    from transformers import AutoModelForCausalLM

    normconvert.convert(save(gpt2(), tmp_path / "src"), tmp_path / "out", verify=False)
    model: Any = (
        normconvert.load(tmp_path / "out")
        if opened == "load"
        else AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    )
    train(model)
    model.save_pretrained(tmp_path / "trained")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        truth = model(ids).logits
        again: Any = normconvert.load(tmp_path / "trained")
        remote = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", trust_remote_code=True)
        assert distance(again(ids).logits, truth) < 1e-6
        assert distance(remote(ids).logits, truth) < 1e-6


def test_what_the_original_architecture_saves_loads_as_converted_until_it_was_trained(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = gpt2()
    normconvert.convert(save(model, tmp_path / "src"), tmp_path / "out", verify=False)
    stock: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    stock.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "modeling_normconvert.py").exists()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found: Any = normconvert.load(tmp_path / "saved")
        assert type(found.transformer.ln_f).__name__ == "RMSNorm"
        assert distance(found(ids).logits, model(ids).logits) < 1e-5
    # What normconvert.load gives writes all that trust_remote_code needs.
    found.save_pretrained(tmp_path / "repaired")
    assert (tmp_path / "repaired" / "modeling_normconvert.py").exists()
    train(stock)
    stock.save_pretrained(tmp_path / "trained")
    with pytest.raises(InputError, match="trained and saved as the original architecture"):
        normconvert.load(tmp_path / "trained")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, converted."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("converted")
    normconvert.convert(save(gpt2(), root / "src"), root / "out", verify=False)
    return root / "out"


@pytest.mark.parametrize(
    "rows",
    [[{"op": "new", "shape": [10**12]}], [{"op": "x"}], [7], {"a": 1}, [{"op": "center"}], [{"op": "fill"}],
     [{"op": "center", "axis": 0, "outer": 7}], [{"op": "center", "axis": 0, "outer": 0}]],
)  # fmt: skip
def test_what_a_config_says_was_done_is_checked_before_it_is_done(rows: Any, converted: Path, tmp_path: Path) -> None:
    file = shutil.copytree(converted, tmp_path / "out") / "config.json"
    config = json.loads(file.read_text())
    config["normconvert"]["changed"] = {next(iter(config["normconvert"]["changed"])): rows}
    file.write_text(json.dumps(config))
    for name in ("normconvert.json", "modeling_normconvert.py"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(InputError, match=r"config\.json: (not a conversion record|what it says of)"):
        normconvert.load(tmp_path / "out")


def test_half_precision_is_not_taken_for_training(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    normconvert.convert(save(gpt2().bfloat16(), tmp_path / "src"), tmp_path / "out", verify=False)
    GPT2LMHeadModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    for dtype in (None, torch.float64):
        model = normconvert.load(tmp_path / "saved", dtype=dtype)
        assert type(model.get_submodule("transformer.ln_f")).__name__ == "RMSNorm"
