"""What the report measures layer by layer: errors show where they arise, and changes on purpose are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import normconvert
from normconvert.verification.divergence import comparable
from normconvert.verification.layer_measures import OUTPUT, Measures, layer_of, measure


@pytest.fixture(scope="module")
def measures(converted: tuple[Path, Path]) -> Measures:
    return measure(*converted)


def test_every_layer_is_measured_and_agrees(measures: Measures) -> None:
    names = [layer.name for layer in measures.layers]
    assert [n for n in names if n.startswith("transformer.h.")] == ["transformer.h.0", "transformer.h.1"]
    assert names[-1] == OUTPUT
    for layer in measures.layers:
        assert layer.algebra < 1e-13
        assert layer.converted < 4 * max(layer.original, measures.eps)
    assert any(layer.original > 1e-9 for layer in measures.layers)  # the noise is really measured


def test_means_are_there_before_and_gone_after(measures: Measures) -> None:
    assert [norm.path for norm in measures.norms][:2] == ["transformer.h.0.ln_1", "transformer.h.0.ln_2"]
    assert len(measures.norms) == 5
    for norm in measures.norms:
        assert norm.before > 1e-2
        assert norm.after is not None
        assert norm.after < 1e-5
        assert norm.rms_after == pytest.approx(norm.rms_before, rel=0.5)
    assert measures.parameters["original"] == measures.parameters["converted"] > 0
    assert measures.perplexity is None  # there is no tokenizer


def test_an_error_shows_from_the_layer_it_is_in(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    shutil.copytree(out, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.weight"] *= 1.01
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    layers = {layer.name: layer for layer in measure(source, tmp_path / "out").layers}
    assert layers["transformer.h.0"].converted < 1e-5
    assert layers["transformer.h.1"].converted > 1e-3
    assert layers[OUTPUT].converted > 1e-4
    assert layers[OUTPUT].original < 1e-5
    assert layers[OUTPUT].algebra < 1e-13  # the plan is right, the files are not


def test_modules_that_are_changed_on_purpose_are_no_error(folder: Path) -> None:
    """A fused convolution computes what its BatchNorm computed; what follows agrees again."""
    normconvert.convert("demo:convnet", folder / "fused", "fuse-bn", verify=False)
    found = measure("demo:convnet", folder / "fused")
    assert {"layer1.0", "layer4.0", "fc", OUTPUT} <= {layer.name for layer in found.layers}
    assert max(layer.algebra for layer in found.layers) < 1e-13
    assert all(norm.after is None for norm in found.norms)  # none is left to read anything
    assert found.parameters["converted"] < found.parameters["original"]


def test_perplexity_is_measured_on_text_where_there_is_a_tokenizer(folder: Path) -> None:
    normconvert.convert("demo:gpt2", folder / "king", verify=False)
    found = measure("demo:gpt2", folder / "king").perplexity
    assert found is not None
    assert 10 < found["original"] < 1000
    assert found["converted"] == pytest.approx(found["original"], rel=1e-4)
    assert found["tokens"] > 30


def test_what_is_changed_on_purpose_is_left_out_and_what_breaks_is_not() -> None:
    rows = [(f"m.{name}", differs) for name, differs in zip("abcde", (False, True, False, True, True), strict=True)]
    rows.append(("head", False))
    assert comparable(rows, trailing=True) == {0, 2, 3, 4, 5}
    assert comparable(rows, trailing=False) == {0, 2, 5}
    towers = [("t.text.a", True), ("t.text.b", True), ("t.image.a", False), ("t.image.b", False)]
    assert comparable(towers, trailing=True) == {0, 1, 2, 3}  # nothing of the text agrees after the break


def test_layers_are_elements_of_lists() -> None:
    assert layer_of("transformer.h.3.attn.c_attn") == "transformer.h.3"
    assert layer_of("layers.0.blocks.1.mlp.net.0") == "layers.0.blocks.1"
    assert layer_of("layer1.0.downsample.0") == "layer1.0"
    assert layer_of("transformer.wte") == "transformer.wte"
