"""The embedded models: ordinary checkpoints for unmodified libraries, small, and trained as their cards say."""

from __future__ import annotations

import math
import re
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from normconvert.errors import InputError
from normconvert.files import embedded
from tools.demos.digits import digits, held_out_lines
from tools.demos.train_demos import DIGIT_MODELS, accuracy, language_model_loss

LIMITS = {"gpt2": 3_000_000, "vit": 1_000_000, "convnet": 1_000_000}


def _card(name: str) -> tuple[dict[str, float], str]:
    """The figures in the front matter of the model card, and its text."""
    _, front, body = (embedded.demo_folder(name) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    (result,) = yaml.safe_load(front)["model-index"][0]["results"]
    return {metric["type"]: metric["value"] for metric in result["metrics"]}, body


def _digit_model(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{embedded.demo_folder(name)}", pretrained=True)
    return model.eval()


@pytest.mark.parametrize("name", embedded.DEMOS)
def test_demo_is_small_enough_for_a_wheel(name: str) -> None:
    size = sum(file.stat().st_size for file in embedded.demo_folder(name).rglob("*") if file.is_file())
    assert size <= LIMITS[name]


@pytest.mark.parametrize("name", embedded.DEMOS)
def test_card_is_of_the_weights_beside_it(name: str) -> None:
    _, body = _card(name)
    match = re.search(r"`([0-9a-f]{64})`", body)
    assert match is not None
    assert match[1] == sha256((embedded.demo_folder(name) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", embedded.DEMOS)
def test_norms_have_left_their_initial_values(name: str) -> None:
    """Weights of one and biases of zero would hide most mistakes of a conversion."""
    from safetensors.torch import load_file

    state = load_file(embedded.demo_folder(name) / "model.safetensors")
    vectors = {key: value for key, value in state.items() if re.search(r"(ln_\w+|norm\d?|bn\d)\.(weight|bias)$", key)}
    assert len(vectors) >= 18
    for key, value in vectors.items():
        assert (value - (1.0 if key.endswith("weight") else 0.0)).abs().max() > 0.01, key


def test_language_model_beats_every_unigram_model_on_unseen_text() -> None:
    """Unmodified transformers loads it, and its loss on held-out books is the card's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.demo_folder("gpt2")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = embedded.held_out_text()
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    assert tokenizer.decode(ids) == text

    loss = language_model_loss(model.eval(), ids, model.config.n_positions)
    # No model that knows token frequencies alone, were they even this text's own, gets below their entropy.
    frequency = torch.bincount(ids).double() / len(ids)
    entropy = -torch.special.xlogy(frequency, frequency).sum().item()
    assert loss < entropy - 1.0
    figures, _ = _card("gpt2")
    assert loss == pytest.approx(figures["loss"], abs=0.02)  # the card counts one <|endoftext|> a book as well
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]), rel=1e-4)


def test_language_model_generates_words() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.demo_folder("gpt2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer("And it came to pass", return_tensors="pt"), max_new_tokens=200, do_sample=False)
    words = re.findall(r"[a-z]+", tokenizer.decode(ids[0]).lower())
    known = set(re.findall(r"[a-z]+", embedded.held_out_text().lower()))
    assert sum(word in known for word in words) > 0.8 * len(words) > 50


@pytest.mark.parametrize(("name", "least"), [("vit", 0.96), ("convnet", 0.97)])
def test_digit_model_reads_held_out_digits_as_its_card_says(name: str, least: float) -> None:
    images, labels = digits("test", size=DIGIT_MODELS[name]["size"])
    measured = accuracy(_digit_model(name), images, labels)
    assert measured >= least
    figures, _ = _card(name)
    assert measured == pytest.approx(figures["accuracy"], abs=1e-6)


def test_digits_are_split_without_overlap() -> None:
    (train, _), (test, labels) = digits("train"), digits("test", size=8)
    assert train.shape == (1437, 1, 8, 8)
    assert test.shape == (360, 1, 8, 8)
    assert torch.bincount(labels).min() >= 34
    distances = torch.cdist(test.flatten(1), train.flatten(1))
    assert distances.min() > 0


def test_what_the_demo_reads_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # not installed
    pixels, labels = embedded.held_out_digits()
    assert pixels.shape == (360, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10))


def test_shipped_digits_are_what_scikit_learn_holds_out() -> None:
    """The training set is what is left of scikit-learn's: an image in both would have been seen in training."""
    images, labels = embedded.held_out_digits()
    table = torch.cat([images.flatten(1), labels[:, None]], 1)
    assert [",".join(map(str, row)) for row in table.tolist()] == held_out_lines()


def test_convnet_has_batch_norms_with_statistics() -> None:
    norms = [m for m in _digit_model("convnet").modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) >= 10
    for norm in norms:
        assert norm.num_batches_tracked is not None
        assert norm.num_batches_tracked > 0
        assert norm.running_var is not None
        assert norm.running_var.min() > 0


def test_unknown_demo_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"demo:gtp2: no such demo.* vit; did you mean demo:gpt2"):
        embedded.demo_folder("gtp2")


def test_folders_hold_only_what_a_checkpoint_needs() -> None:
    """What lies in the package's folder is shipped: no stray file, nothing that runs."""
    allowed = {".json", ".safetensors", ".md", ".txt"}
    for name in embedded.DEMOS:
        files = [file for file in embedded.demo_folder(name).rglob("*") if file.is_file()]
        assert {file.suffix for file in files} <= allowed
        assert Path(embedded.demo_folder(name) / "config.json") in files
