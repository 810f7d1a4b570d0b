"""What a swap learns from: read, made ready, checked against the model before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.sources import open_source
from normconvert.tuning.compare import label_loss
from normconvert.tuning.data import open_data, wanted_by
from normconvert.tuning.data.batches import Columns, Part, all_batches, rows_at, training_batch


@pytest.fixture(scope="module")
def gpt2() -> tuple[Any, Any]:
    source = open_source("demo:gpt2")
    return wanted_by(source, source.skeleton()), source.load()


@pytest.fixture(scope="module")
def vit() -> tuple[Any, Any]:
    source = open_source("demo:vit")
    return wanted_by(source, source.skeleton()), source.load()


def test_each_pass_sees_each_example_once_whatever_the_processes() -> None:
    seen = [i for step in range(5) for i in rows_at(step, 4, 10, seed=1)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]
    data = Columns("x", {"x": torch.arange(10)})
    one = training_batch(data, 3, 4, seed=1)["x"]
    two = torch.cat([training_batch(data, 3, 2, seed=1, rank=r, world=2)["x"] for r in (0, 1)])
    assert torch.equal(one, two)
    part = Part(data, (7, 2, 5))
    assert len(part) == 3
    assert part.batch([0, 2])["x"].tolist() == [7, 5]
    rows = [b["x"].tolist() for rank in (0, 1) for b in all_batches(data, 3, rank=rank, world=2)]
    assert sorted(i for row in rows for i in row) == list(range(10))


def test_text_becomes_windows_and_their_own_labels(gpt2: tuple[Any, Any], tmp_path: Path) -> None:
    wanted, model = gpt2
    file = tmp_path / "a.txt"
    file.write_text("In the beginning God created the heaven and the earth.\n" * 40)
    data = open_data(f"text:{file}", wanted, model, length=32)
    batch = data.batch([0, 1])
    assert batch["input_ids"].shape == (2, 32)
    assert data.labelled
    assert data.shifted
    assert torch.equal(batch["labels"], batch["input_ids"])
    found = wanted.source.tokenizer().decode(batch["input_ids"][0])
    assert found.startswith("In the beginning God created")
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], labels=batch["input_ids"])
    torch.testing.assert_close(label_loss(output.logits, batch["labels"], shifted=True), output.loss)


def test_a_model_makes_its_own_text(gpt2: tuple[Any, Any]) -> None:
    """Seeded, and likelier to the model than chance."""
    from normconvert.tuning.data.demo import sample

    wanted, model = gpt2
    a, b = (sample(model, wanted, 24, count=3) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (72,)
    ids = a.reshape(3, 24)
    with torch.no_grad():
        own = label_loss(model(input_ids=ids).logits, ids, shifted=True)
        random = torch.randint(0, 2048, (3, 24))
        chance = label_loss(model(input_ids=random).logits, random, shifted=True)
    assert own < chance - 2


def test_folders_of_images_are_made_ready_as_the_model_was_trained(vit: tuple[Any, Any], tmp_path: Path) -> None:
    from PIL import Image

    from normconvert.tuning.data.digits import digits

    images, labels = digits("test")
    for i in range(60):
        folder = tmp_path / str(int(labels[i]))
        folder.mkdir(exist_ok=True)
        pixels = ((images[i, 0] + 1) / 2 * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (tmp_path / "0" / "readme.md").write_text("no image")
    wanted, model = vit
    data = open_data(f"imagefolder:{tmp_path}", wanted, model)
    assert len(data) == 60
    assert data.labelled
    batch = data.batch(list(range(60)))
    assert batch[wanted.main].shape == (60, 1, 8, 8)
    with torch.no_grad():
        right = model(batch[wanted.main]).argmax(1) == batch["labels"]
    assert float(right.double().mean()) > 0.9
    (tmp_path / "0" / "broken.png").write_bytes(b"not an image")
    data = open_data(f"imagefolder:{tmp_path}", wanted, model)
    with pytest.raises(InputError, match=r"broken\.png: not a readable image"):
        data.batch(list(range(61)))
    (tmp_path / "ten").mkdir()
    assert not open_data(f"imagefolder:{tmp_path}", wanted, model).labelled


def test_ready_inputs(vit: tuple[Any, Any], tmp_path: Path) -> None:
    wanted, model = vit
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    np.savez(tmp_path / "a.npz", x=x.numpy(), labels=labels.numpy())
    save_file({"x": x, "labels": labels}, tmp_path / "a.safetensors")
    for name in ("npz", "safetensors"):
        data = open_data(f"{name}:{tmp_path}/a.{name}", wanted, model)
        batch = data.batch([5, 0])
        assert torch.equal(batch["x"], x[[5, 0]])
        assert batch["labels"].tolist() == [5, 0]


def test_tables_of_text(gpt2: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    wanted, model = gpt2
    file = tmp_path / "a.parquet"
    parquet.write_table(table({"text": ["And God said, Let there be light. " * 9] * 3, "n": [1, 2, 3]}), file)
    for name in (f"parquet:{file}", f"parquet:{file}:text"):
        assert open_data(name, wanted, model, length=16).batch([0])["input_ids"].shape == (1, 16)
    with pytest.raises(InputError, match="no column 'words'; there are text, n"):
        open_data(f"parquet:{file}:words", wanted, model)
    with pytest.raises(InputError, match="holds no text"):
        open_data(f"parquet:{file}:n", wanted, model)


def test_data_sets_of_the_datasets_package(gpt2: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    wanted, model = gpt2
    (tmp_path / "train.txt").write_text("And God said, Let there be light.\n" * 30)
    data = open_data(f"hf:{tmp_path}:train:text", wanted, model, length=16)
    assert data.batch([0])["input_ids"].shape == (1, 16)


IDS = torch.randint(0, 2048, (4, 8))
IMAGES = torch.randn(4, 1, 8, 8)
BAD: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "vocabulary": ("gpt2", {"input_ids": IDS + 2048}, "is outside the model's vocabulary of 2048"),
    "dtype": ("gpt2", {"input_ids": IDS.float()}, "input_ids is float32; expected integers"),
    "length": ("gpt2", {"input_ids": torch.zeros(2, 300).long()}, "texts of 300 tokens; the model takes at most 256"),
    "argument": ("gpt2", {"ids": IDS}, "expected the model's arguments input_ids"),
    "size": ("vit", {"x": torch.randn(4, 1, 9, 9)}, r"images of shape \[1, 9, 9\]; the model takes \[1, 8, 8\]"),
    "pixels": ("vit", {"x": IMAGES.mul(9).long()}, "x is int64; expected floating pixels"),
    "empty": ("vit", {"x": IMAGES[:0]}, "no examples"),
    "rows": ("vit", {"x": IMAGES, "labels": torch.arange(3)}, "different numbers of examples: .*labels 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_does_not_fit_is_named(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    demo, columns, message = BAD[case]
    wanted, model = request.getfixturevalue(demo)
    save_file(columns, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        open_data(f"safetensors:{tmp_path}/a.safetensors", wanted, model)


REFUSED = {
    "text:{}/nothing.txt": "no such file or folder",
    "text:{}/empty.txt": "0 tokens are less than one example",
    "text:{}/latin.txt": "not readable as UTF-8 text",
    "npz:{}/empty.txt": "not a readable npz file",
    "safetensors:{}/empty.txt": "not a readable safetensors file",
    "imagefolder:{}": "images, but GPT2LMHeadModel takes input_ids",
    "csv:{}/a.csv": "unknown data",
    "text:": "where\\? expected text:FILE",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name: str, gpt2: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(InputError, match=REFUSED[name]):
        open_data(name.format(tmp_path), *gpt2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "64"], "3 examples to learn from are less than one batch of 64"),
        (["--objective", "task", "--batch-size", "2"], "--objective task needs labels, and there are none"),
        (["--norms", "blocks.*.ln"], "matches no norm; the nearest are"),
        (["--resume"], "nothing to resume"),
        (["--steps", "-1"], "steps is -1; expected 0 or more"),
        (["--lr", "0"], "lr is 0.0; expected a positive number"),
        (["--device", "cuda:9"], "cannot be used here"),
    ],
)
def test_a_swap_that_cannot_be_is_refused_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"x": IMAGES}, tmp_path / "a.safetensors")
    data = f"safetensors:{tmp_path}/a.safetensors"
    assert run(["swap", "un", "demo:vit", str(tmp_path / "out"), "--data", data, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


def test_labels_beyond_the_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": IMAGES, "labels": torch.arange(4) + 9}, tmp_path / "a.safetensors")
    data = f"safetensors:{tmp_path}/a.safetensors"
    status = run(["swap", "un", "demo:vit", str(tmp_path / "out"), "--data", data, "--batch-size", "2"])
    assert status == 2
    assert "for a model of 10 classes" in capsys.readouterr().err


def test_a_model_without_layer_norms_has_nothing_to_swap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["swap", "un", "demo:convnet", str(tmp_path / "out"), "--data", "demo:"]) == 3
    assert "no norm can be swapped" in capsys.readouterr().err


def test_an_image_is_distorted_alike_in_whichever_process() -> None:
    from normconvert.tuning.data.images import Distorted

    data = Distorted("x", "x", torch.randn(12, 1, 8, 8), torch.arange(12), -1.0)
    one = training_batch(data, 2, 4, seed=5)["x"]
    two = torch.cat([training_batch(data, 2, 2, seed=5, rank=r, world=2)["x"] for r in (0, 1)])
    assert torch.equal(one, two)
    assert not torch.equal(one, data.images[rows_at(2, 4, 12, seed=5)])
    assert not torch.equal(one, training_batch(data, 5, 4, seed=5)["x"])
