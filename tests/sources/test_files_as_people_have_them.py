"""Whatever training, compiling and publishing leave around a model's weights: the same model, and a word about it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normconvert
from normconvert.errors import InputError
from normconvert.files.wrapping import prefixes, unwrapped
from normconvert.sources import open_source
from normconvert.sources.hub import wanted_files
from tests.support.bare_weights import UNIQUE, state_of, write
from tests.support.equivalence import distance
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import gpt2, save

IDS = torch.arange(12).reshape(2, 6)
State = dict[str, Tensor]
PREFIXES = [
    "_orig_mod.", "module.", "module._orig_mod.", "model.", "base_model.model.", "model._orig_mod.", "net.model.",
    "module.model.", "whatever.",
]  # fmt: skip


def rename(folder: Path, prefix: str, **more: Tensor) -> Path:
    """Put a prefix before the names in a folder's weight file."""
    state = load_file(folder / "model.safetensors")
    state = {f"{prefix}{name}": value for name, value in state.items()} | more
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FACTS = """
import sys
from normconvert.sources import open_source
def found(tensors, folder, facts):
    print(*facts, sep="\\n", flush=True)
    sys.exit(any(name in sys.modules for name in ("torch", "transformers", "timm")))
open_source(sys.argv[1], found=found)
"""


def test_what_a_checkpoint_is_is_known_before_torch_is_imported(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "src")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    state = {f"model.{name}": value for name, value in state_of(UNIQUE).items()}
    timm_file = write(state, tmp_path / "w.safetensors")
    expected = {
        folder: ["GPT2LMHeadModel (transformers), ", "weights of the variant fp16: model.fp16.safetensors"],
        timm_file: [f"{UNIQUE} (timm), ", "identified as timm:", "the tensors' names are taken without 'model.'"],
    }
    for path, starts in expected.items():
        done = subprocess.run([sys.executable, "-c", FACTS, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [line[: len(start)] for line, start in zip(done.stdout.splitlines(), starts, strict=True)] == starts


# -- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_folder_loads_as_the_model_inside_the_wrapping(tmp_path: Path, prefix: str, form: str) -> None:
    model = gpt2().double()
    folder = save(model, tmp_path / "src", form)
    if form == "bin":
        torch.save({f"{prefix}{n}": v for n, v in model.state_dict().items()}, folder / "pytorch_model.bin")
    else:
        rename(folder, prefix)
    source = open_source(str(folder))
    assert any("names are taken without" in note for note in source.notes)
    loaded: Any = source.load(dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_output_has_the_names_that_the_library_looks_for(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = gpt2().double()
    folder = rename(save(model, tmp_path / "src"), "model._orig_mod.")
    report = normconvert.convert(folder, tmp_path / "out")
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "_orig_mod" in name]
    with torch.no_grad():
        for found in (normconvert.load(tmp_path / "out"), GPT2LMHeadModel.from_pretrained(tmp_path / "out")):
            assert distance(found(IDS).logits, model(IDS).logits) < 1e-12
    assert normconvert.verify(folder, tmp_path / "out").passed
    assert normconvert.check(tmp_path / "out", folder).passed


def test_weights_that_stay_in_their_files_are_found_behind_a_prefix(tmp_path: Path) -> None:
    folder = rename(save(gpt2(), tmp_path / "src"), "net.model.")
    normconvert.convert(folder, tmp_path / "out", verify=False)
    assert normconvert.verify(folder, tmp_path / "out", max_memory=8 * 10**9, level="quick").passed


def test_a_value_that_is_not_finite_is_seen_behind_a_prefix(tmp_path: Path) -> None:
    folder = rename(save(gpt2(), tmp_path / "src"), "model.")
    state = load_file(folder / "model.safetensors")
    state["model.transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        normconvert.convert(folder, tmp_path / "out", verify=False)


def test_sharded_weights_lose_their_prefix_too(tmp_path: Path) -> None:
    model = gpt2().double()
    folder = save(model, tmp_path / "src", "sharded")
    for shard in folder.glob("model-*.safetensors"):
        save_file({f"module.{n}": v for n, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"module.{name}": file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    normconvert.convert(folder, tmp_path / "out")
    with torch.no_grad():
        assert distance(normconvert.load(tmp_path / "out")(IDS).logits, model(IDS).logits) < 1e-12


def test_what_lies_beside_the_model_in_a_training_module_does_not_hide_it(tmp_path: Path) -> None:
    folder = rename(save(gpt2(), tmp_path / "src"), "model.", **{"criterion.weight": torch.ones(3)})
    source = open_source(str(folder))
    assert source.notes[-1] == "tensors that GPT2LMHeadModel has no place for, copied as they are: criterion.weight"
    assert "criterion.weight" not in source.name_map
    assert source.name_map["transformer.wte.weight"] == "transformer.wte.weight"


def test_names_that_miss_a_tensor_are_refused_with_a_prefix_as_without(tmp_path: Path) -> None:
    folder = rename(save(gpt2(), tmp_path / "src"), "model.")
    state = load_file(folder / "model.safetensors")
    del state["model.transformer.h.1.ln_1.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="the weights do not fit GPT2LMHeadModel"):
        open_source(str(folder))


def test_a_class_that_is_not_certain_does_not_become_so_by_a_prefix(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    from tests.support.tiny_checkpoints import GPT2_SIZES

    folder = save(perturb(GPT2Model(GPT2Config(**GPT2_SIZES)).eval()), tmp_path / "src")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="which may compute differently"):
        open_source(str(rename(folder, "model.")))


def test_two_names_that_would_become_one_keep_theirs() -> None:
    assert unwrapped(["a.weight", "module.a.weight"]) == ({n: n for n in ("a.weight", "module.a.weight")}, ())
    assert unwrapped(["n_averaged", "module.a._orig_mod.b"])[0]["module.a._orig_mod.b"] == "a.b"
    assert list(prefixes(["model.net.a.w", "model.net.b.w", "loss.w"])) == ["model.", "model.net."]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "model._orig_mod.", "any.thing."])
def test_a_bare_file_is_identified_without_its_prefix(tmp_path: Path, prefix: str) -> None:
    state = state_of(UNIQUE)
    file = write({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "w.safetensors")
    loaded = open_source(str(file)).load().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "encoder.net."])
@pytest.mark.parametrize("arch", [None, f"timm:{UNIQUE}"])
def test_a_bare_file_is_identified_beside_what_training_kept(tmp_path: Path, prefix: str, arch: str | None) -> None:
    state = state_of(UNIQUE)
    beside = {"criterion.weight": torch.ones(3), "projector.0.weight": torch.ones(3, 3), "queue": torch.ones(2)}
    file = write({f"{prefix}{name}": value for name, value in state.items()} | beside, tmp_path / "w.safetensors")
    source = open_source(str(file), arch=arch)
    loaded = source.load().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert any("copied as they are: criterion.weight" in note for note in source.notes)


@pytest.mark.parametrize(
    ("one", "other"), [("student.", "teacher."), ("encoder_q.", "module.encoder_k."), ("model.", "ema_model.")]
)
@pytest.mark.parametrize("arch", [None, f"timm:{UNIQUE}"])
def test_of_two_models_in_one_file_none_is_taken(tmp_path: Path, one: str, other: str, arch: str | None) -> None:
    state = {f"{one}{name}": value for name, value in state_of(UNIQUE).items()}
    state |= {f"{other}{name}": value + 1 for name, value in state_of(UNIQUE).items()}
    file, named = write(state, tmp_path / "w.safetensors"), {one, other.removeprefix("module.")}
    with pytest.raises(InputError, match=r"it holds 2 models, under .*: save the one that is meant alone") as caught:
        open_source(str(file), arch=arch)
    assert all(repr(prefix) in str(caught.value) for prefix in named)


# -- timm's train.py ------------------------------------------------------------------------------------------------

TRAINED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("test_resnet", {"gp": "max"}, {"global_pool": "max"}),
    ("test_efficientnet", {"bn_eps": 0.1}, {"bn_eps": 0.1}),
    ("test_resnet", {"in_chans": 1, "gp": "avgmax"}, {"in_chans": 1, "global_pool": "avgmax"}),
    ("test_resnet", {"input_size": [1, 64, 64]}, {"in_chans": 1}),
    ("test_vit", {"model_kwargs": {"img_size": 64, "pos_embed": "learn"}}, {"img_size": 64}),
    ("test_resnet", {"model_kwargs": {"block_args": {"attn_layer": "se"}}}, {"block_args": {"attn_layer": "se"}}),
]


@pytest.mark.parametrize(("name", "said", "arguments"), TRAINED)
def test_the_arguments_of_timms_training_are_honoured(
    tmp_path: Path, name: str, said: dict[str, Any], arguments: dict[str, Any]
) -> None:
    from argparse import Namespace

    made: nn.Module = timm.create_model(name, num_classes=5, **arguments)
    model = perturb(made.eval())
    args: dict[str, Any] = {
        "model": name,
        "gp": None,
        "bn_eps": None,
        "in_chans": None,
        "input_size": None,
        "model_kwargs": {},
    }
    file = tmp_path / "last.pth.tar"
    torch.save({"arch": name, "args": Namespace(**(args | said)), "state_dict": model.state_dict()}, file)
    model, source = model.double(), open_source(str(file))
    assert source.architecture == name
    images = torch.randn(2, arguments.get("in_chans", 3), 64, 64, dtype=torch.float64)
    method = "rmsnorm" if "vit" in name else "fuse-bn"
    normconvert.convert(file, tmp_path / "out", method)
    with torch.no_grad():
        expected = model(images)
        assert distance(source.load(dtype=torch.float64)(images), expected) < 1e-12
        assert distance(normconvert.load(tmp_path / "out", dtype=torch.float64)(images), expected) < 1e-6  # stored
    for key, value in arguments.items():
        assert any(f"the model was made with {key}={value}" in note for note in source.notes)


def test_arguments_of_another_model_are_not_used(tmp_path: Path) -> None:
    from argparse import Namespace

    args = Namespace(model="resnet18", gp="max", bn_eps=None, model_kwargs={})
    torch.save({"args": args, "state_dict": state_of("test_resnet")}, tmp_path / "w.pth")
    source = open_source(str(tmp_path / "w.pth"), arch="timm:test_resnet")
    assert any("args are of resnet18: they are not used" in note for note in source.notes)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay", "pretrained"])
def test_arguments_that_would_load_other_weights_are_refused(tmp_path: Path, name: str) -> None:
    from argparse import Namespace

    torch.save(state_of(UNIQUE), tmp_path / "other.pth")
    args = Namespace(model=UNIQUE, gp=None, bn_eps=None, model_kwargs={name: str(tmp_path / "other.pth")})
    torch.save({"args": args, "state_dict": state_of(UNIQUE)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"its args say {name} in model_kwargs, which would load other weights"):
        open_source(str(tmp_path / "w.pth"))


def test_arguments_out_of_all_proportion_are_refused(tmp_path: Path) -> None:
    from argparse import Namespace

    args = Namespace(model=UNIQUE, gp=None, bn_eps=None, model_kwargs={"depth": 10**9})
    torch.save({"args": args, "state_dict": state_of(UNIQUE)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="says depth: 1000000000"):
        open_source(str(tmp_path / "w.pth"))


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["safetensors", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sharded", "bin"))]
)
def test_the_only_variant_is_taken_and_said(tmp_path: Path, form: str) -> None:
    from transformers import GPT2LMHeadModel

    model: Any = gpt2().double()
    folder = tmp_path / "src"
    if form == "bin":
        save(model, folder, "bin")
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model.fp16.bin")
    else:
        model.save_pretrained(folder, variant="fp16", max_shard_size="60KB" if form == "sharded" else "1GB")
    source = open_source(str(folder))
    assert any("weights of the variant fp16" in note for note in source.notes)
    normconvert.convert(folder, tmp_path / "out")
    with torch.no_grad():
        assert distance(source.load()(IDS).logits, model(IDS).logits) < 1e-12
        found: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
        assert distance(found(IDS).logits, model(IDS).logits) < 1e-12
    assert not [path.name for path in (tmp_path / "out").iterdir() if "fp16" in path.name and form != "sharded"]


def test_of_several_variants_one_is_asked_for(tmp_path: Path) -> None:
    folder, models = tmp_path / "src", {name: gpt2().double() for name in ("fp16", "bf16", None)}
    for name, model in models.items():
        if name:
            model.save_pretrained(folder, variant=name)  # type: ignore[operator]
    with pytest.raises(InputError, match="weights of the variants bf16, fp16: say which by --variant NAME"):
        open_source(str(folder))
    with pytest.raises(InputError, match="no weights of the variant 'fp8': the folder has bf16, fp16"):
        open_source(str(folder), variant="fp8")
    models[None].save_pretrained(folder)  # type: ignore[operator]
    for name, model in models.items():
        with torch.no_grad():
            loaded: Any = open_source(str(folder), variant=name).load()
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    file = folder / "model.bf16.safetensors"
    assert open_source(str(file)).folder == folder
    assert any("variant bf16" in note for note in open_source(str(file)).notes)
    normconvert.convert(folder, tmp_path / "out", variant="bf16")
    assert normconvert.verify(folder, tmp_path / "out").passed
    assert normconvert.check(tmp_path / "out", folder).passed


def adapter(folder: Path, weights: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/other"}')
    if weights:
        save_file({"base_model.model.h.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_alone_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"an adapter \(adapter_config.json, adapter_model.safetensors\), not a model"):
        open_source(str(adapter(tmp_path / "src")))


@pytest.mark.parametrize("weights", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_adapters_files_beside_a_model_are_said_and_left_out(tmp_path: Path, weights: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = gpt2().double()
    folder = adapter(save(model, tmp_path / "src"), weights)
    report = normconvert.convert(folder, tmp_path / "out")
    assert any(note.startswith("adapter_config.json") and "left out" in note for note in report.notes)
    with torch.no_grad():
        found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert distance(found(IDS).logits, model(IDS).logits) < 1e-12
    assert not list((tmp_path / "out").glob("adapter*"))


def test_checkpoints_of_the_training_are_left_out_and_said(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "src")
    shutil.copytree(folder, folder / "checkpoint-500")
    (folder / "other").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "other")
    report = normconvert.convert(folder, tmp_path / "out")
    assert "checkpoints of the training were left out: checkpoint-500/" in report.notes
    assert "weights in other folders were left out: other/model.safetensors" in report.notes
    assert not (tmp_path / "out" / "checkpoint-500").exists()
    assert normconvert.check(tmp_path / "out", folder).passed


def test_a_link_to_a_snapshot_of_the_hubs_cache_is_the_snapshot(tmp_path: Path) -> None:
    home = tmp_path / "models--org--name"
    folder = save(gpt2(), home / "blobs")
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (tmp_path / "link").symlink_to(snapshot)
    outputs = []
    for name in ("link", str(snapshot.relative_to(tmp_path))):
        normconvert.convert(tmp_path / name, tmp_path / "out", overwrite=True)
        files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        outputs.append({n: b for n, b in files.items() if n not in ("normconvert.json", "README.md")})
    assert outputs[0] == outputs[1]


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "gone.safetensors").symlink_to("/nowhere/x")
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(InputError, match=r"gone.safetensors: a link that leads nowhere \('/nowhere/x'\)"):
            open_source(str(path))


def test_a_config_without_a_model_type_is_said(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r'names no model_type, .*that of GPT2LMHeadModel is "gpt2": write it there'):
        open_source(str(folder))


def test_of_a_variant_on_the_hub_its_own_weights_are_fetched() -> None:
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = ["config.json", "model.safetensors", "model.bf16.safetensors", "model.safetensors.index.fp16.json", *shards]
    assert wanted_files(names) == ["config.json", "model.safetensors", "model.safetensors.index.fp16.json"]
    fetched = ["config.json", *shards, "model.safetensors.index.fp16.json"]
    assert wanted_files(names, "fp16") == fetched
    assert wanted_files(names, "fp8") == ["config.json", "model.safetensors.index.fp16.json"]
