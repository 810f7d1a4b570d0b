"""A converted adapter does on the converted checkpoint what the adapter does on the original, however it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import normconvert
from normconvert.adapters.adapter_files import read_adapter
from normconvert.adapters.conversion import convert_adapter
from normconvert.adapters.merging import merge
from normconvert.adapters.prompts import Prompted
from normconvert.cli import run
from normconvert.errors import InputError
from tests.support.adapters import BATCH, float64_checkpoint, logits, off, stock, train
from tests.support.tiny_checkpoints import contents, gpt2

peft = pytest.importorskip("peft")

EXACT = 1e-10


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float64_checkpoint(gpt2(), tmp_path_factory.mktemp("adapters") / "gpt2")


@pytest.fixture(scope="module")
def conversions(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("converted")
    ways: dict[str, dict[str, Any]] = {
        "rmsnorm": {}, "untied": {"tied": "untie"}, "fold": {"fold": True}, "crmsnorm": {"method": "crmsnorm"},
    }  # fmt: skip
    for name, options in ways.items():
        normconvert.convert(original, where / name, verify=False, **options)
    return {name: where / name for name in ways}


def lora(*targets: str, **settings: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=list(targets), **settings)


def check(
    original: Path,
    converted: Path,
    config: Any,
    where: Path,
    by_stock: bool = True,
    limit: float = EXACT,
    needed: bool = True,
) -> None:
    """Convert an adapter, and run it by PEFT in the stock class and as normconvert loads the checkpoint."""
    adapter = train(original, where / "adapter", config)
    convert_adapter(adapter, where / "out", converted, source=original)
    expected = logits(stock(original), adapter)
    assert off(logits(normconvert.load(converted), where / "out"), expected) <= limit
    if by_stock:
        assert off(logits(stock(converted), where / "out"), expected) <= limit
    try:
        unconverted = off(logits(normconvert.load(converted), adapter), expected)
    except (RuntimeError, KeyError):  # other shapes, another tensor
        return
    assert unconverted > 1e-6 or not needed, "nothing needed to be converted"


@pytest.mark.parametrize("way", ["rmsnorm", pytest.param("untied", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "config",
    [
        lora("c_proj"),
        lora("c_proj", use_rslora=True, alpha_pattern={"attn.c_proj": 7}, rank_pattern={"mlp.c_proj": 2}),
        lora("c_proj", "c_attn", "c_fc", lora_bias=True),
        lora("c_proj", bias="all"),
        lora("wte", "wpe", "c_proj"),
        lora("c_proj", modules_to_save=["ln_f", "wte", "mlp"]),
        lora("c_proj", modules_to_save=["lm_head"]),
    ],
    ids=["writers", "rslora", "lora_bias", "biases", "embeddings", "modules", "head"],
)
def test_lora_of_the_original_is_converted(
    original: Path, conversions: dict[str, Path], way: str, config: Any, tmp_path: Path
) -> None:
    check(original, conversions[way], config, tmp_path)


@pytest.mark.parametrize("way", ["fold", "crmsnorm"])
@pytest.mark.parametrize(
    "config",
    [
        lora("c_proj", "c_attn", "c_fc"),
        lora("c_attn", lora_bias=True),
        lora("c_attn", bias="all"),
        lora("c_proj", modules_to_save=["ln_1", "ln_2", "c_attn", "c_fc"]),
    ],
    ids=["readers", "lora_bias", "biases", "blocks"],
)
def test_what_reads_a_folded_norm_takes_its_weight_and_bias(
    original: Path, conversions: dict[str, Path], way: str, config: Any, tmp_path: Path
) -> None:
    check(original, conversions[way], config, tmp_path, by_stock=way == "fold")


def test_the_head_that_becomes_narrower_takes_its_lora(
    original: Path, conversions: dict[str, Path], tmp_path: Path
) -> None:
    check(original, conversions["crmsnorm"], lora("wte", "wpe", "c_proj"), tmp_path, by_stock=False)


def test_a_saved_head_takes_the_bias_that_it_gains(
    original: Path, conversions: dict[str, Path], tmp_path: Path
) -> None:
    check(original, conversions["crmsnorm"], lora("c_proj", modules_to_save=["lm_head"]), tmp_path, by_stock=False)


def test_dora_is_converted_where_rows_stay_apart(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(original, tmp_path / "adapter", lora("c_attn", use_dora=True))
    report = convert_adapter(adapter, tmp_path / "out", conversions["rmsnorm"], source=original)
    assert report.edited == ()
    assert (
        load_file(adapter / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    )
    expected = logits(stock(original), adapter)
    assert off(logits(normconvert.load(conversions["rmsnorm"]), tmp_path / "out"), expected) <= EXACT


def test_dora_takes_the_scale_of_a_folded_norm_without_bias(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    from tests.support.perturb import perturb

    sizes: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    original = float64_checkpoint(perturb(CohereForCausalLM(CohereConfig(**sizes))), tmp_path / "cohere")
    folded = normconvert.convert(original, tmp_path / "folded", fold=True, verify=False).plan
    assert [row["op"] for row in folded.tensors["model.layers.0.mlp.up_proj.weight"]] == ["scale"]
    # Its norms cast to float32 by themselves, so that is how close two runs of it come.
    check(original, tmp_path / "folded", lora("up_proj", "q_proj", use_dora=True), tmp_path, limit=1e-6)


def test_dora_on_a_centred_writer_is_refused(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(original, tmp_path / "adapter", lora("c_proj", use_dora=True))
    with pytest.raises(InputError, match=r"DoRA scales the rows of a weight .*center"):
        convert_adapter(adapter, tmp_path / "out", conversions["rmsnorm"], source=original)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["rmsnorm", "untied", "crmsnorm"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_are_centred(original: Path, conversions: dict[str, Path], way: str, kind: str, tmp_path: Path) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    # PEFT keeps prompts in float32, whatever the model and the file are in. Centring stands where prompts and ids have
    # joined, so that rmsnorm's output takes a prompt of the original as well.
    check(original, conversions[way], config, tmp_path, way != "crmsnorm", limit=1e-7, needed=way == "crmsnorm")


def test_a_prefix_stays_as_it_is(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(original, tmp_path / "a", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    report = convert_adapter(adapter, tmp_path / "out", conversions["crmsnorm"], source=original)
    assert report.edited == ()
    expected = logits(stock(original), adapter)
    assert off(logits(normconvert.load(conversions["crmsnorm"]), tmp_path / "out"), expected) <= EXACT


def test_a_half_precision_adapter_is_not_rounded_again(original: Path, tmp_path: Path) -> None:
    adapter = train(original, tmp_path / "adapter", lora("c_proj"))
    file = adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    float32 = tmp_path / "float32"
    gpt2().save_pretrained(float32)  # type: ignore[operator]
    normconvert.convert(float32, tmp_path / "converted", verify=False)
    convert_adapter(adapter, tmp_path / "out", tmp_path / "converted", source=float32)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-2]: value.dtype for name, value in found.items()} == {
        "lora_A": torch.bfloat16, "lora_B": torch.float32,
    }  # fmt: skip


def test_a_converted_adapter_says_what_it_is_for(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(original, tmp_path / "adapter", lora("c_proj"))
    before = contents(tmp_path / "adapter"), contents(conversions["rmsnorm"]), contents(original)
    for out in ("one", "two"):
        convert_adapter(adapter, tmp_path / out, conversions["rmsnorm"], source=original)
    assert before == (contents(tmp_path / "adapter"), contents(conversions["rmsnorm"]), contents(original))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(conversions["rmsnorm"])
    record = json.loads((tmp_path / "one" / "normconvert_adapter.json").read_text())
    assert record["fidelity"]["passed"]
    assert (record["converted"], record["source"]) == ("rmsnorm", "gpt2")


@pytest.mark.parametrize(
    "config",
    [
        lora("c_proj", use_rslora=True, alpha_pattern={"attn.c_proj": 7}, rank_pattern={"mlp.c_proj": 2}),
        lora("c_proj", "c_attn", lora_bias=True),
        lora("wte", "c_fc", bias="all"),
        lora("c_fc", "c_proj", use_dora=True, modules_to_save=["ln_f", "lm_head"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["rslora", "lora_bias", "table", "dora", "prompt", "prefix"],
)
def test_what_is_verified_is_what_peft_computes(original: Path, config: Any, tmp_path: Path) -> None:
    folder = train(original, tmp_path / "adapter", config)
    adapter = read_adapter(folder)
    model = stock(original)
    merged: Any = merge(model, adapter) if adapter.prompt is None else Prompted(model, adapter)
    with torch.no_grad():
        found = merged(**BATCH).logits
    # PEFT keeps prompts in float32.
    assert off(found, logits(stock(original), folder)) <= (EXACT if adapter.prompt is None else 1e-6)


def test_counters_in_saved_norms_are_let_be(tmp_path: Path) -> None:
    import timm

    folder = Path(normconvert.__file__).parent / "demos/convnet"
    settings = peft.LoraConfig(r=2, target_modules=["conv1.0", "conv1.3"], modules_to_save=["norm_pre", "bn1"])
    model: Any = peft.get_peft_model(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "adapter")
    normconvert.convert("demo:convnet", tmp_path / "fused", "fuse-bn", verify=False)
    convert_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "fused")
    x = torch.randn(2, 1, 28, 28)
    fused = peft.PeftModel.from_pretrained(normconvert.load(tmp_path / "fused"), tmp_path / "out").eval()
    with torch.no_grad():
        assert off(fused(x), model.eval()(x)) <= 1e-5


def test_the_command_line_does_the_same(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(original, tmp_path / "adapter", lora("c_proj"))
    convert_adapter(adapter, tmp_path / "api", conversions["rmsnorm"], source=original)
    arguments = ["adapter", str(adapter), str(tmp_path / "out"), "--for", str(conversions["rmsnorm"])]
    assert run([*arguments, "--json", str(tmp_path / "refused.json")]) == 2
    assert "--source" in json.loads((tmp_path / "refused.json").read_text())["error"]
    assert run([*arguments, "--source", str(original), "--json", str(tmp_path / "report.json")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "api")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["command"], report["kind"], len(report["edited"]), report["copied"]) == ("adapter", "LORA", 4, 4)


def _without_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def _with(**settings: Any) -> Any:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def _other_shape(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: value[..., :-1].contiguous() for name, value in load_file(file).items()}, file)


def _other_module(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace("transformer.h", "model.layers"): v for name, v in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_config, "not a PEFT adapter"),
        (_with(peft_type="IA3"), "peft_type IA3: expected one of LORA"),
        (_with(init_lora_weights="pissa"), "changes the model's own weights"),
        (_with(use_qalora=True), "sets use_qalora"),
        (_with(use_dora=True), "use_dora and the tensors"),
        (_with(lora_alpha="x"), "not the config of a PEFT adapter .lora_alpha"),
        (_with(lora_alpha=None), "not the config of a PEFT adapter .lora_alpha"),
        (_with(alpha_pattern=[1]), "not the config of a PEFT adapter .alpha_pattern"),
        (_with(alpha_pattern={"(": 1}), "is no regular expression"),
        (_with(alpha_pattern={"(a+)+b": 1}), "repeats more than a name needs"),
        (_with(alpha_pattern={".*.*.*.*x": 1}), "repeats more than a name needs"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("[" * 5000 + "]" * 5000), "not valid JSON"),
        (_other_shape, "one of another model"),
        (_other_module, "does not have"),
    ],
)
def test_what_is_not_understood_is_refused(
    original: Path, conversions: dict[str, Path], change: Any, message: str, tmp_path: Path
) -> None:
    adapter = train(original, tmp_path / "adapter", lora("c_proj"))
    change(adapter)
    with pytest.raises(InputError, match=message):
        convert_adapter(adapter, tmp_path / "out", conversions["rmsnorm"], source=original)
    assert not (tmp_path / "out").exists()


def test_what_has_no_place_in_the_adapter_is_refused(
    original: Path, conversions: dict[str, Path], tmp_path: Path
) -> None:
    dora = train(original, tmp_path / "dora", lora("c_attn", use_dora=True))
    with pytest.raises(InputError, match="DoRA has no bias"):
        convert_adapter(dora, tmp_path / "out", conversions["fold"], source=original)
    norms = train(original, tmp_path / "norms", lora("c_proj", modules_to_save=["ln_1"]))
    with pytest.raises(InputError, match="has no place for another"):
        convert_adapter(norms, tmp_path / "out", conversions["fold"], source=original)
    with pytest.raises(InputError, match="--source"):
        convert_adapter(norms, tmp_path / "out", conversions["fold"])
    with pytest.raises(InputError, match="not converted by normconvert"):
        convert_adapter(norms, tmp_path / "out", original, source=original)


def test_another_source_is_no_match(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    from tests.support.perturb import perturb

    other = float64_checkpoint(perturb(gpt2(), seed=5), tmp_path / "other")
    adapter = train(original, tmp_path / "adapter", lora("c_proj"))
    with pytest.raises(normconvert.errors.FidelityError, match="nothing was written"):
        convert_adapter(adapter, tmp_path / "out", conversions["rmsnorm"], source=other)
    assert not (tmp_path / "out").exists()


def test_loading_the_originals_adapter_warns(original: Path, conversions: dict[str, Path], tmp_path: Path) -> None:
    import warnings

    adapter = train(original, tmp_path / "adapter", lora("c_proj"))
    convert_adapter(adapter, tmp_path / "out", conversions["rmsnorm"], source=original)
    model: Any = normconvert.load(conversions["rmsnorm"])
    with pytest.warns(UserWarning, match="normconvert adapter"):
        model.load_adapter(str(adapter))
    own = train(conversions["rmsnorm"], tmp_path / "own", lora("c_proj"))
    for good in (tmp_path / "out", own):
        model = normconvert.load(conversions["rmsnorm"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.load_adapter(str(good))
        assert not [w for w in caught if "normconvert" in str(w.message)]
