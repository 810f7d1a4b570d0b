"""Softmax attention is swapped for a linear one: which, how it learns, and what the output is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import normconvert
from normconvert.analysis.attentions import Attention
from normconvert.cli import run
from normconvert.errors import InputError, NothingToConvert
from normconvert.runtime import LinearAttention
from normconvert.tuning.attention import BlendedAttention, choose_attentions
from normconvert.tuning.settings import Settings
from normconvert.tuning.training import attention_left


class Softmaxes(TorchFunctionMode):
    """Counts calls of softmax attention."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (F.scaled_dot_product_attention, torch.softmax, F.softmax, Tensor.softmax)
        return func(*args, **(kwargs or {}))


def softmaxes(model: nn.Module, *inputs: Tensor) -> int:
    with torch.no_grad(), Softmaxes() as counted:
        model(*inputs)
    return counted.count


def linear(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, LinearAttention)]


EVERYWHERE = [f"blocks.{i}.attn" for i in range(4)]


@pytest.mark.slow
def test_a_vision_transformer_learns_linear_attention(tmp_path: Path) -> None:
    """The short version of docs/swap.md's figures."""
    out = tmp_path / "out"
    report = normconvert.swap("demo:vit", out, "sla", data="demo:", steps=60, batch_size=64, attention=["*"])
    before, calibrated, tuned = (report.figures[k].accuracy or 0 for k in ("original", "calibrated", "tuned"))
    assert tuned > max(calibrated, before - 0.05)
    assert list(report.attention) == EVERYWHERE
    assert report.swapped == ()
    assert len(report.left) == 9
    model = normconvert.load(out)
    assert linear(model) == [f"{path}.linear_attention" for path in EVERYWHERE]
    from normconvert.tuning.data.digits import digits

    images, labels = digits("test")
    assert softmaxes(model, images[:2]) == 0
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).double().mean())
    assert right == pytest.approx(tuned, abs=0.003)
    card = (out / "README.md").read_text()
    assert "simplified linear attention" in card
    assert "the attention of 4 modules converted, trained" in card
    assert "its attention is another" in card
    import timm

    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.create_model(f"local-dir:{out}", pretrained=True)


def test_slab_leaves_neither_norm_nor_softmax(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = normconvert.swap(
        "demo:vit", out, "slab", data="demo:", steps=8, batch_size=32, calibration=64, attention=["*"]
    )
    assert report.left == ()
    assert report.fused is not None
    assert report.fused.algebra <= 1e-10
    model = normconvert.load(out)
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert len(linear(model)) == 4
    assert softmaxes(model, torch.randn(2, 1, 8, 8)) == 0
    assert [row["mix"] for row in report.trace][-1] == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT of transformers, and images for it."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       image_size=16, patch_size=4, num_labels=5)  # fmt: skip
    model = ViTForImageClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    save_file({"pixel_values": torch.randn(32, 3, 16, 16)}, folder / "images.data")
    return folder


def images_of(folder: Path, into: Path) -> str:
    file = into / "images.safetensors"
    file.write_bytes((folder / "images.data").read_bytes())
    return f"safetensors:{file}"


@pytest.mark.parametrize(("method", "fuse"), [("sla", True), ("slab", True), ("slab", False)])
def test_transformers_loads_it_with_its_code_and_not_without(
    method: str, fuse: bool, source: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification, ViTForImageClassification

    out, again = tmp_path / "out", tmp_path / "again"
    report = normconvert.swap(source, out, method, data=images_of(source, tmp_path), steps=2, batch_size=8,
                              attention=["*"], fuse=fuse)  # fmt: skip
    assert len(report.attention) == 2
    x = torch.randn(2, 3, 16, 16)
    own = normconvert.load(out)
    auto = AutoModelForImageClassification.from_pretrained(out, trust_remote_code=True)
    auto.save_pretrained(again)
    saved = AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True)
    with torch.no_grad():
        truth = own(x).logits
        assert torch.equal(auto(x).logits, truth)
        assert torch.equal(saved(x).logits, truth)
    assert softmaxes(own, x) == 0
    for folder in (out, again):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            ViTForImageClassification.from_pretrained(folder)


def test_a_renamed_weight_is_seen_under_its_old_name(source: Path, tmp_path: Path) -> None:
    import copy

    out = tmp_path / "out"
    normconvert.swap(source, out, "sla", data=images_of(source, tmp_path), steps=1, batch_size=8, attention=["*"])
    model: Any = normconvert.load(out)
    state = model.state_dict()
    (renamed,) = [name for name in state if name.endswith("_beside_linear_attention")]
    old = renamed.removesuffix("_beside_linear_attention")
    assert old not in state
    path, _, leaf = old.rpartition(".")
    for one in (model, copy.deepcopy(model)):
        module = one.get_submodule(path)
        assert type(module).__name__ == "Linear"
        assert isinstance(module, nn.Linear)
        assert torch.equal(getattr(module, leaf), state[renamed])
    empty = [name for name, value in load_file(out / "model.safetensors").items() if not value.numel()]
    assert len(empty) == 1


def test_nothing_gains_or_can_be_swapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["swap", "sla", "demo:vit", str(tmp_path / "out"), "--data", "demo:"])
    assert status == 3
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(r"17 tokens, and a linear one would not be faster with fewer than about \d\d\d", error)
    assert "--attention swaps it all the same" in error
    with pytest.raises(NothingToConvert, match=r"`transformer.h.0.attn`: it is causal"):
        normconvert.swap("demo:gpt2", tmp_path / "out", "slab", data="demo:")
    assert not (tmp_path / "out").exists()


def test_the_modules_named_are_swapped_and_the_others_reported(tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    status = run(["swap", "sla", "demo:vit", str(out), "--data", "demo:", "--attention", "blocks.[13].attn",
                  "--steps", "2", "--batch-size", "8", "--json", str(report), "--quiet"])  # fmt: skip
    assert status == 0
    said = json.loads(report.read_text())["attention"]
    assert said["swapped"] == ["blocks.1.attn", "blocks.3.attn"]
    assert said["left"] == dict.fromkeys(["blocks.0.attn", "blocks.2.attn"], "it is not among --attention.")
    assert softmaxes(normconvert.load(out), torch.randn(2, 1, 8, 8)) == 2


def test_options_of_the_other_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--attention 'layers\.\*' matches none; the nearest are blocks"):
        normconvert.swap("demo:vit", tmp_path / "out", "sla", data="demo:", attention=["layers.*"])
    with pytest.raises(InputError, match="--attention is for sla and slab, and un leaves"):
        normconvert.swap("demo:vit", tmp_path / "out", "un", data="demo:", attention=["*"])
    with pytest.raises(InputError, match="--norms is for methods that swap norms"):
        normconvert.swap("demo:vit", tmp_path / "out", "sla", data="demo:", norms=["*"])


def test_a_forward_that_calls_attention_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers import Attention as TimmAttention

    own = TimmAttention.forward

    def twice(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, x, *args, **kwargs) + own(self, x, *args, **kwargs)

    monkeypatch.setattr(TimmAttention, "forward", twice)
    with pytest.raises(InputError, match="calls scaled_dot_product_attention 2 times, not once"):
        normconvert.swap("demo:vit", tmp_path / "out", "sla", data="demo:", attention=["blocks.0.attn"])


def test_only_layers_that_gain_are_chosen() -> None:
    few, many = (Attention(f"a{n}", 6, 64, n * n, (n, n)) for n in (8, 28))
    refused = Attention("b", obstacle="it is causal")
    chosen, left = choose_attentions([few, many, refused], [])
    assert chosen == (many,)
    assert left["b"] == "it is causal."
    assert left["a8"].startswith("it has 64 tokens")
    assert choose_attentions([few, many, refused], ["a8", "b"])[0] == (few,)


def test_softmax_attention_fades_after_each_layer_has_learnt_by_itself() -> None:
    settings = Settings("sla")
    shares = [attention_left(settings, p) for p in (0.0, 0.2, 0.25, 0.375, 0.5, 0.9)]
    assert shares == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert attention_left(Settings("sla", schedule="none"), 0.3) == 0
    assert attention_left(Settings("sla", matching=0.0), 0.25) == 0.5


@pytest.mark.parametrize("mix", [1.0, 0.25, 0.0])
def test_a_blend_is_what_it_says(mix: float) -> None:
    torch.manual_seed(0)
    site = Attention("a", 2, 8, 13, (3, 4), 1)
    blend = BlendedAttention(site, torch.empty(0, dtype=torch.float64))
    alone = LinearAttention(2, 8, (3, 4), 1, like=torch.empty(0, dtype=torch.float64))
    for parameter in blend.parameters():
        nn.init.normal_(parameter)
    alone.load_state_dict({k: v for k, v in blend.state_dict().items() if k != "mix"})
    q, k, v = torch.randn(3, 2, 2, 13, 8, dtype=torch.float64)
    blend.set_mix(mix)
    one, other = F.scaled_dot_product_attention(q, k, v, scale=0.3), alone(q, k, v)
    torch.testing.assert_close(blend(q, k, v, scale=0.3), mix * one + (1 - mix) * other)
    error = blend.take_error()
    assert blend.take_error() is None
    if mix:
        assert error is not None
        torch.testing.assert_close(error.double(), ((other - one) ** 2).mean() / (one**2).mean(), rtol=1e-5, atol=0)


def test_a_training_that_goes_astray_names_the_attention(tmp_path: Path) -> None:
    from normconvert.sources import open_source
    from normconvert.tuning.attention import blend
    from normconvert.tuning.guard import worst_part
    from normconvert.tuning.student import Student

    teacher = open_source("demo:vit").load(dtype=torch.float32).eval()
    model = open_source("demo:vit").load(dtype=torch.float32).eval()
    site = Attention("blocks.2.attn", 4, 16, 17, (4, 4), 1)
    student = Student(model, {}, (), {}, blend(model, [site]))
    student.attentions["blocks.2.attn"].positions.data.fill_(torch.nan)
    student.attentions["blocks.2.attn"].set_mix(0.5)
    assert worst_part(student, teacher, {"x": torch.randn(2, 1, 8, 8)}).startswith("the attention `blocks.2.attn`")


def test_a_training_is_gone_on_with_to_the_same_result(tmp_path: Path) -> None:
    def swap(out: Path, **more: Any) -> None:
        normconvert.swap(
            "demo:vit", out, "sla", data="demo:", steps=6, batch_size=8, attention=["blocks.1.attn"], **more
        )

    class Stopped(Exception):
        pass

    def stop(step: int, steps: int, shown: Any) -> None:
        if step == 4:
            raise Stopped

    swap(tmp_path / "whole")
    with pytest.raises(Stopped):
        swap(tmp_path / "parts", batches_between_checkpoints=2, watch=stop)
    swap(tmp_path / "parts", batches_between_checkpoints=2, resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize("library", ["timm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_its_norms_can_be_converted_afterwards(library: str, source: Path, tmp_path: Path) -> None:
    of, data = ("demo:vit", "demo:") if library == "timm" else (source, images_of(source, tmp_path))
    linear_one, both = tmp_path / "linear", tmp_path / "both"
    normconvert.swap(of, linear_one, "sla", data=data, steps=1, batch_size=8, attention=["*"])
    report = normconvert.convert(linear_one, both, "rmsnorm")
    assert report.fidelity is not None
    assert report.fidelity.passed
    x = torch.randn(2, 1, 8, 8) if library == "timm" else torch.randn(2, 3, 16, 16)
    one, other = (normconvert.load(folder) for folder in (linear_one, both))
    assert linear(one) == linear(other)
    with torch.no_grad():
        results = [getattr(y, "logits", y) for y in (one(x), other(x))]
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_the_output_is_exported_to_onnx(tmp_path: Path) -> None:
    normconvert.swap("demo:vit", tmp_path / "out", "slab", data="demo:", steps=4, batch_size=32, attention=["*"])
    normconvert.export(tmp_path / "out", tmp_path / "model.onnx")
    import onnx

    operators = {node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}
    assert not operators & {"Softmax", "Attention", "LayerNormalization"}
