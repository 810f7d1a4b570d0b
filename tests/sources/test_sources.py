"""Opening checkpoints: every form gives the same names, values and model as the library itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import Source, open_source
from tests.support.applied_plans import apply_plan
from tests.support.tiny_checkpoints import gpt2, save, save_vit, vit


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    assert [name for name in b if not torch.equal(a[name], b[name])] == []


def assert_maps_exactly(source: Source, model: nn.Module) -> None:
    """Every mapped checkpoint tensor is, bit for bit, the model tensor it is mapped to."""
    state = model.state_dict()
    assert source.name_map
    assert [n for n, target in source.name_map.items() if not torch.equal(source.read(n), state[target])] == []


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "sharded-bin"])
def test_every_form_of_a_transformers_folder_opens(tmp_path: Path, form: str) -> None:
    model = gpt2()
    source = open_source(str(save(model, tmp_path / "src", form)))
    assert (source.library, source.architecture, source.one_to_one) == ("transformers", "GPT2LMHeadModel", True)
    assert source.dtype == torch.float32
    assert source.is_pickle == ("bin" in form)
    assert_maps_exactly(source, model)
    assert_same_state(source.load(), model)


def test_skeleton_has_the_head_and_no_memory(tmp_path: Path) -> None:
    model = gpt2()
    skeleton = open_source(str(save(model, tmp_path / "src"))).skeleton()
    assert type(skeleton).__name__ == "GPT2LMHeadModel"
    assert all(x.is_meta for x in [*skeleton.parameters(), *skeleton.buffers()])
    assert not skeleton.training
    assert skeleton.get_parameter("lm_head.weight") is skeleton.get_parameter("transformer.wte.weight")


def test_load_in_float64_has_the_same_values(tmp_path: Path) -> None:
    model = gpt2()
    loaded = open_source(str(save(model, tmp_path / "src"))).load(dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in loaded.parameters())
    assert_same_state(loaded, model.double())


def test_names_without_base_prefix_and_old_masks_map_like_in_transformers(tmp_path: Path) -> None:
    """The original gpt2 on the hub: no ``transformer.`` prefix, and ``attn.bias`` masks that nothing uses."""
    model = gpt2()
    folder = save(model, tmp_path / "src")
    state = {
        n.removeprefix("transformer."): t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"
    }
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(float("-inf"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder))
    assert source.name_map["h.0.ln_1.weight"] == "transformer.h.0.ln_1.weight"
    strays = {f"h.{layer}.attn.{mask}" for layer in range(2) for mask in ("bias", "masked_bias")}
    assert set(source.tensors) - set(source.name_map) == strays
    assert_maps_exactly(source, model)


def test_base_model_class_reads_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    folder = save(model, tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2Model"]}))
    source = open_source(str(folder))
    assert source.name_map["transformer.wte.weight"] == "wte.weight"
    assert "lm_head.weight" not in source.name_map
    assert_maps_exactly(source, source.load())


def test_gamma_and_beta_of_old_checkpoints_are_weight_and_bias(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from tests.support.perturb import perturb

    sizes = {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 80,
    }
    model = perturb(BertModel(BertConfig(**sizes)).eval())
    folder = save(model, tmp_path / "src")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder))
    assert source.name_map["embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"
    assert_maps_exactly(source, model)


def test_merged_experts_are_not_one_to_one(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.support.perturb import perturb

    config = MixtralConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3,
        intermediate_size=40, num_local_experts=2,
    )  # fmt: skip
    model = perturb(MixtralForCausalLM(config).eval())
    source = open_source(str(save(model, tmp_path / "src")))
    assert not source.one_to_one
    assert any("experts" in name for name in source.merged)
    assert_same_state(source.load(), model)


def test_timm_folder_opens(tmp_path: Path) -> None:
    model = vit()
    source = open_source(str(save_vit(model, tmp_path / "src")))
    assert (source.library, source.architecture) == ("timm", "vit_tiny_patch16_224")
    assert_maps_exactly(source, model)
    assert_same_state(source.load(), model)
    assert all(p.is_meta for p in source.skeleton().parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bare_weights_open_with_arch_and_take_their_classes_from_the_head(tmp_path: Path, suffix: str) -> None:
    import timm

    from tests.support.perturb import perturb

    model = perturb(timm.create_model("vit_tiny_patch16_224", num_classes=3).eval())
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":  # as a training script saves it
        torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}, "epoch": 3}, path)
    else:
        save_file(model.state_dict(), path)
    source = open_source(str(path), arch="timm:vit_tiny_patch16_224")
    assert source.folder is None
    assert source.config["num_classes"] == 3
    assert_same_state(source.load(), model)


def test_read_gives_a_private_view_of_the_file(tmp_path: Path) -> None:
    source = open_source(str(save(gpt2(), tmp_path / "src")))
    before = source.read("transformer.wpe.weight").clone()
    source.read("transformer.wpe.weight").zero_()
    assert torch.equal(source.read("transformer.wpe.weight"), before)


def test_a_misaligned_tensor_reads_the_same(tmp_path: Path) -> None:
    """Other writers may put a tensor at an odd offset."""
    from normconvert.files.safetensors_file import map_tensor, read_header

    value = torch.randn(5)
    header = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
              "value": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]}}  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"abc" + value.numpy().tobytes())
    assert torch.equal(map_tensor(read_header(path).tensors["value"]), value)


def test_the_record_of_an_output_is_read(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "src")
    (folder / "normconvert.json").write_text('{"format": 1}')
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_normconvert.NormConverted"}
    (folder / "config.json").write_text(json.dumps(config))
    source = open_source(str(folder))
    assert source.record == {"format": 1}
    assert type(source.skeleton()).__name__ == "GPT2LMHeadModel"


def test_unknown_arch_names_the_nearest(tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="vit_small_patch16_224"):
        open_source(str(tmp_path / "w.safetensors"), arch="timm:vit_smal_patch16_224")


def test_importing_sources_imports_no_library() -> None:
    code = "import sys, normconvert.sources; print([m for m in ('torch', 'transformers', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_original_checkpoints_go_through_timms_own_filter(tmp_path: Path) -> None:
    """The first Swin checkpoints: a mask in the files, the downsampling at the end of a stage, the head without fc."""
    import timm

    from tests.support.perturb import perturb

    arguments = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    model = perturb(timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **arguments).eval())
    folder = save_vit(model, tmp_path / "src", arguments)
    old = {
        n.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): t
        for n, t in model.state_dict().items()
    }
    save_file({k: v.contiguous() for k, v in old.items()}, folder / "model.safetensors")
    source = open_source(str(folder))
    assert not source.one_to_one
    assert_same_state(source.load(), model)
    name = "layers.0.blocks.0.mlp.fc2.weight"
    result = apply_plan(source, Plan("x", tensors={name: [{"op": "fill", "value": 2.0}]}), tmp_path / "out")
    assert result.notes
    out = open_source(str(tmp_path / "out"))
    assert out.one_to_one
    changed = out.load()
    assert bool((changed.get_parameter(name) == 2.0).all())
    changed.get_parameter(name).data.copy_(model.get_parameter(name).data)
    assert_same_state(changed, model)


def test_opening_a_model_waits_for_no_scipy_and_its_losses_work_all_the_same() -> None:
    code = (
        "import sys; from normconvert.sources import open_source; open_source('demo:gpt2');"
        "assert 'scipy.optimize' not in sys.modules;"
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment as assign;"
        "assert assign([[1, 0], [0, 1]])[1].tolist() == [1, 0];"
        "import scipy.optimize; assert scipy.optimize.minimize"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
