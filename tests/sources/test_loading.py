"""A converted checkpoint loads in every way it is meant to, as RMSNorm where it can be, with the original's outputs."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.plan.edits import apply_edits
from normconvert.runtime import RMSNorm
from normconvert.sources.converted import huggingface_files, load
from tests.support.equivalence import distance
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import with_tokenizer

TOLERANCE = 1e-10  # invariant I2


def norms(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()}


def hand_plan(model: nn.Module, writers: list[str], vectors: list[str], centers: list[str]) -> Plan:
    """Every LayerNorm becomes RMSNorm; ``writers`` (Linear, Conv1D, Conv2d) and ``vectors`` (..., d) are centred."""
    tensors: dict[str, list[dict[str, Any]]] = {name: [{"op": "center", "axis": -1}] for name in vectors}
    for path in writers:
        kind = type(model.get_submodule(path)).__name__
        tensors[f"{path}.weight"] = [{"op": "center", "axis": 1 if kind == "Conv1D" else 0}]
        tensors[f"{path}.bias"] = [{"op": "center", "axis": 0}]
    rows: list[dict[str, Any]] = [
        {"op": "center", "path": path, "side": "output", "key": "", "axis": -1} for path in centers
    ]
    verdicts = []
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            rows.append(
                {"op": "replace", "path": path, "kind": "rmsnorm", "size": module.normalized_shape[0],
                 "eps": module.eps, "axis": -1, "weight": "weight", "bias": "bias", "offset": 0.0, "upcast": False,
                 "mean_free": True}
            )  # fmt: skip
            verdicts.append(Verdict(path, "LayerNorm", True, "its stream is centred", "converted"))
    return Plan("rmsnorm", tensors=tensors, modules=rows, verdicts=verdicts, classes=["GPT2Model"])


def write(folder: Path, model: nn.Module, plan: Plan, record: dict[str, Any], files: dict[str, str | bytes]) -> Path:
    """What apply does, on a checkpoint that fits in memory."""
    folder.mkdir(parents=True)
    weights = {
        name: apply_edits(value, plan.tensors.get(name, []), lambda name: weights[name]).to(value.dtype).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    record = {"format": 1, "plan": plan.to_json(), "source": {}, **record}
    (folder / "normconvert.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _module_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Remote code is copied to a cache before it runs; not into the user's."""
    from transformers import dynamic_module_utils

    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=3, vocab_size=101, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return perturb(GPT2LMHeadModel(config).double().eval())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = gpt2()
    writers = [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_proj", "mlp.c_proj")]
    plan = hand_plan(model, writers, ["transformer.wpe.weight"], ["transformer.wte"])
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "dtype": "float64"}
    files = huggingface_files(config, plan, "GPT2LMHeadModel")
    record = {"library": "transformers", "architecture": "GPT2LMHeadModel"}
    return model, write(tmp_path_factory.mktemp("text") / "out.v1", model, plan, record, files)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(1))


def remote(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


LOADERS: dict[str, Callable[..., Any]] = {"load": load, "remote": remote}


@pytest.mark.parametrize("loader", list(LOADERS))
def test_the_loaded_model_is_the_original_with_rmsnorm_everywhere(
    text: tuple[Any, Path], ids: Tensor, loader: str
) -> None:
    original, folder = text
    model = LOADERS[loader](folder)
    assert norms(model) == {"RMSNorm"}
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert isinstance(model, type(original))
    assert not any(module.training for module in model.modules())
    assert model.dtype == torch.float64
    assert list(model.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        assert distance(model(ids).logits, original(ids).logits) < TOLERANCE


def test_unmodified_transformers_loads_the_original_architecture_without_asking(
    text: tuple[Any, Path], ids: Tensor
) -> None:
    """Invariant I3."""
    from transformers import AutoModelForCausalLM

    original, folder = text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(original)
    assert norms(model) == {"LayerNorm"}
    with torch.no_grad():
        assert distance(model(ids).logits, original(ids).logits) < TOLERANCE


def test_the_base_model_of_a_converted_head_model_is_converted_too(text: tuple[Any, Path], ids: Tensor) -> None:
    from transformers import AutoModel

    original, folder = text
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "GPT2Model"
    assert norms(model) == {"RMSNorm"}
    with torch.no_grad():
        truth = original.transformer(ids).last_hidden_state
        assert distance(model(ids).last_hidden_state, truth) < TOLERANCE


@pytest.mark.parametrize("loader", list(LOADERS))
def test_save_pretrained_writes_a_converted_checkpoint_again(
    text: tuple[Any, Path], ids: Tensor, tmp_path: Path, loader: str
) -> None:
    from transformers import AutoModelForCausalLM

    original, folder = text
    again = tmp_path / "again"
    LOADERS[loader](folder).save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    models = [load(again), remote(again), AutoModelForCausalLM.from_pretrained(again)]
    assert [norms(model) for model in models] == [{"RMSNorm"}, {"RMSNorm"}, {"LayerNorm"}]
    with torch.no_grad():
        for model in models:
            assert distance(model(ids).logits, original(ids).logits) < TOLERANCE


@pytest.mark.parametrize("loader", list(LOADERS))
def test_generation_is_the_original_s(text: tuple[Any, Path], ids: Tensor, loader: str) -> None:
    original, folder = text
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(LOADERS[loader](folder).generate(ids, **options), original.generate(ids, **options))


def test_a_pipeline_takes_the_output(text: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import pipeline

    folder = with_tokenizer(text[1], tmp_path / "piped")
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    assert norms(pipe.model) == {"RMSNorm"}
    generated = pipe("w3 w4", max_new_tokens=3)[0]["generated_text"]
    assert generated.startswith("w3 w4")
    assert generated.count("w") == 5


@pytest.mark.parametrize("loader", list(LOADERS))
def test_copies_pickles_and_casts_work(text: tuple[Any, Path], ids: Tensor, loader: str) -> None:
    original, folder = text
    model = LOADERS[loader](folder)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        truth = original(ids).logits
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert distance(other(ids).logits, truth) < TOLERANCE
        assert distance(copy.deepcopy(model).half()(ids).logits, truth) < 1e-2
        assert distance(model.bfloat16()(ids).logits, truth) < 1e-1


def test_the_model_compiles_into_one_graph(text: tuple[Any, Path], ids: Tensor) -> None:
    original, folder = text
    compiled = torch.compile(remote(folder), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert distance(compiled(ids, use_cache=False).logits, original(ids).logits) < TOLERANCE


def test_accelerate_dispatches_the_model(text: tuple[Any, Path], ids: Tensor, tmp_path: Path) -> None:
    """With part of the weights on disk, so that accelerate's hooks really work beside ours."""
    original, folder = text
    device_map = {f"transformer.{name}": "cpu" for name in ("wte", "wpe", "drop", "h.0", "ln_f")}
    device_map |= {"transformer.h.1": "disk", "lm_head": "cpu"}
    with torch.no_grad():
        truth = original(ids).logits
        for placed in ("auto", device_map):
            model = remote(folder, device_map=placed, offload_folder=str(tmp_path))
            assert norms(model) == {"RMSNorm"}
            assert distance(model(ids).logits, truth) < TOLERANCE


def test_dtypes_and_fresh_models(text: tuple[Any, Path], ids: Tensor) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    original, folder = text
    for loader in LOADERS.values():
        model = loader(folder, dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with torch.no_grad():
            assert distance(model(ids).logits, original(ids).logits) < 1e-5
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert norms(fresh) == {"RMSNorm"}
    assert bool((fresh.transformer.ln_f.weight == 1).all())


def test_a_fine_tuned_model_is_rmsnorm_all_the_same(text: tuple[Any, Path], ids: Tensor) -> None:
    """After training the stream's mean is anything; one token and many must still go through the same function."""
    model = remote(text[1])
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.bias.add_(0.5)
        whole = model(ids).logits[:, -1]
        first = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    truth = model.train().eval()(ids).logits[:, -1].detach()
    assert distance(whole, truth) < TOLERANCE
    assert distance(step, truth) < TOLERANCE


def test_a_vision_transformer_loads_in_every_way(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    original = perturb(ViTForImageClassification(config).double().eval())
    names = [name for name, _ in original.named_modules()]
    writers = [name for name in names if name.endswith(("projection", "o_proj", "fc2", "output.dense"))]
    vectors = [name for name, _ in original.named_parameters() if name.endswith(("cls_token", "position_embeddings"))]
    plan = hand_plan(original, writers, vectors, [])
    described = config.to_dict() | {"architectures": ["ViTForImageClassification"], "dtype": "float64"}
    files = huggingface_files(described, plan, "ViTForImageClassification")
    record = {"library": "transformers", "architecture": "ViTForImageClassification"}
    folder = write(tmp_path / "out", original, plan, record, files)
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    models = [load(folder), AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)]
    models.append(AutoModelForImageClassification.from_pretrained(folder))
    assert [norms(model) for model in models] == [{"RMSNorm"}, {"RMSNorm"}, {"LayerNorm"}]
    with torch.no_grad():
        for model in models:
            assert distance(model(image).logits, original(image).logits) < TOLERANCE


@pytest.mark.parametrize("with_config", [True, False])
def test_timm_loads_natively_and_converted(tmp_path: Path, with_config: bool) -> None:
    import timm

    options: dict[str, Any] = {"img_size": 16, "patch_size": 4, "depth": 2} if with_config else {}
    name = "vit_tiny_patch16_224" if with_config else "test_vit"
    original = perturb(timm.create_model(name, num_classes=5 if with_config else 1000, **options).double().eval())
    depth = len(original.get_submodule("blocks")._modules)
    writers = ["patch_embed.proj"] + [f"blocks.{i}.{w}" for i in range(depth) for w in ("attn.proj", "mlp.fc2")]
    plan = hand_plan(original, writers, ["cls_token", "pos_embed"], [])
    config = {"architecture": name, "num_classes": 5, "num_features": 192, "model_args": options}
    config["pretrained_cfg"] = {
        "input_size": [3, 16, 16],
        "num_classes": 5,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    files: dict[str, str | bytes] = {"config.json": json.dumps(config)} if with_config else {}
    folder = write(tmp_path / "out", original, plan, {"library": "timm", "architecture": name}, files)
    image = torch.randn(2, *((3, 16, 16) if with_config else (3, 160, 160)), dtype=torch.float64)
    model = load(folder)
    assert norms(model) == {"RMSNorm"}
    assert not model.training
    with torch.no_grad():
        assert distance(model(image), original(image)) < TOLERANCE
        if with_config:
            native = timm.create_model(f"local-dir:{folder}", pretrained=True).double().eval()
            assert distance(native(image), original(image)) < 1e-5  # timm builds in float32


# -- files and errors -----------------------------------------------------------------------------------------------


def test_a_folder_without_a_record_is_refused_with_what_to_do(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match=r"not converted by normconvert.*load it with transformers or timm"):
        load(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not converted by normconvert"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format '2', expected 1"),
        ({"plan": 3}, "not a conversion record"),
        ({"architecture": "BertModel"}, "record is of a BertModel, not of a GPT2LMHeadModel"),
        ({"plan": {"modules": [{"op": "center", "path": "nowhere", "side": "output"}]}}, "no module 'nowhere'"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    text: tuple[Any, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in text[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    record = json.loads((folder / "normconvert.json").read_text())
    (folder / "normconvert.json").write_text(json.dumps(record | change))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_checkpoint_with_its_own_code_keeps_its_auto_map() -> None:
    config = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "c.C"}}
    files = huggingface_files(config, Plan("rmsnorm"), "Mine", own_code=True)
    assert set(files) == {"config.json"}
    assert json.loads(files["config.json"])["auto_map"] == config["auto_map"]


def test_a_class_without_an_auto_class_is_what_auto_model_builds(tmp_path: Path) -> None:
    from transformers import AutoModel, SiglipTextConfig, SiglipTextModel

    config = SiglipTextConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3, vocab_size=101, pad_token_id=0
    )
    SiglipTextModel(config).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for name, content in huggingface_files(described, Plan("rmsnorm"), "SiglipTextModel").items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert isinstance(AutoModel.from_pretrained(tmp_path, trust_remote_code=True), SiglipTextModel)


def test_config_changes_of_the_plan_are_written_and_the_source_s_config_is_not_touched() -> None:
    config = {"model_type": "gpt2", "tie_word_embeddings": True, "text": {"a": 1}, "architectures": ["GPT2LMHeadModel"]}
    before = copy.deepcopy(config)
    plan = Plan("rmsnorm", config={"tie_word_embeddings": False, "text.a": 2})
    files = huggingface_files(config, plan, "GPT2LMHeadModel")
    written = json.loads(files["config.json"])
    assert (written["tie_word_embeddings"], written["text"]["a"]) == (False, 2)
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_normconvert.GPT2LMHeadModel"
    assert config == before
    assert huggingface_files(config, plan, "GPT2LMHeadModel") == files  # invariant I6


def test_the_shipped_file_works_without_normconvert(text: tuple[Any, Path], tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['normconvert'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(text[1])!r}, trust_remote_code=True)\n"
        "print(m.transformer.ln_f)"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RMSNorm(48, eps=1e-05")


def test_the_weights_in_the_files_are_centred(text: tuple[Any, Path]) -> None:
    """The test's own plan does what it says; otherwise the equalities above would prove nothing."""
    weights = load_file(text[1] / "model.safetensors")
    assert float(weights["transformer.h.0.mlp.c_proj.weight"].mean(1).abs().max()) < 1e-15
    assert float(weights["transformer.wte.weight"].mean(1).abs().max()) > 1e-3
    assert isinstance(load(text[1]).get_submodule("transformer.ln_f"), RMSNorm)
