"""The worst losses of a swapped model beside the original's: how they are counted, on what, and what refuses them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.sources import open_source
from normconvert.tuning.data import wanted_by
from normconvert.tuning.data.adversarial import EXAMPLES, RUN, adversarial
from normconvert.tuning.data.batches import Columns
from normconvert.tuning.processes import Processes
from normconvert.tuning.tails import SHARES, HeavyTail, Tail, check_tails, quantiles, tails_of


def tail_of(original: list[float], swapped: list[float], data: str = "x") -> Tail:
    return Tail(data, "nats per token", 9, *(dict(zip(SHARES, row, strict=True)) for row in (original, swapped)))


def test_a_quantile_is_the_least_loss_that_so_many_do_not_exceed() -> None:
    losses = torch.randperm(2000).double()
    assert quantiles(losses) == {"50 %": 999, "99 %": 1979, "99.9 %": 1997, "max": 1999}
    wanted = [float(np.quantile(losses.numpy(), q, method="inverted_cdf")) for q in SHARES.values()]
    assert list(quantiles(losses).values()) == wanted
    assert quantiles(torch.tensor([3.0])) == dict.fromkeys(SHARES, 3.0)
    assert quantiles(torch.tensor([1.0, torch.nan, 2.0]))["max"] == math.inf


def test_the_worst_tail_is_named() -> None:
    fine, bad = tail_of([1, 2, 3, 4], [9, 2, 3, 8], "fine"), tail_of([1, 2, 3, 4], [1, 2, 12, 4], "bad")
    check_tails([fine, bad], 4.0)  # the median is no tail
    said = "on bad the 99.9 % quantile of the losses is 12 nats per token, 4 times the original's 3; --guard-tails "
    with pytest.raises(HeavyTail, match=f"{said}allows 3.9 times; nothing was written"):
        check_tails([fine, bad], 3.9)
    check_tails([tail_of([0, 0, 0, 0.001], [0, 0, 0, 0.19])], 2.0)  # nobody minds 0.19 nats
    with pytest.raises(HeavyTail, match="the largest loss is inf"):
        check_tails([tail_of([1, 2, 3, 4], [1, 2, 3, math.inf])], 100.0)
    assert tail_of([1, 2, 3, 4], [1, 2, 3, math.inf]).to_json()["swapped"]["max"] is None


class Scores(nn.Module):
    """A model whose logits are the data itself, times a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": x * self.scale}


@pytest.mark.parametrize("kind", ["tokens", "classes", "decisions"])
def test_losses_are_those_of_tokens_or_of_examples(kind: str) -> None:
    """Against numpy; tokens are shifted by one, padding does not count, and a decision stands for an unknown class."""
    torch.manual_seed(0)
    x, mask = torch.randn(6, 5, 4), torch.ones(6, 5, dtype=torch.int64)
    mask[0, :2] = 0
    columns, shifted = {"x": x, "attention_mask": mask}, kind == "tokens"
    if kind == "tokens":
        columns["labels"] = torch.where(mask.bool(), torch.randint(0, 4, (6, 5)), -100)
        rows, labels = x[:, :-1].reshape(-1, 4), columns["labels"][:, 1:].flatten()
    elif kind == "classes":
        columns = {"x": x[:, 0], "labels": torch.randint(0, 4, (6,))}
        rows, labels = columns["x"], columns["labels"]
    else:
        rows, labels = x.reshape(-1, 4), torch.where(mask.bool(), x.argmax(-1), -100).flatten()
    data = Columns("some data", columns, shifted=shifted)
    (tail,), notes = tails_of(Scores(3.0), Scores(1.0), {"some data": data}, Processes(), batch_size=4)
    assert not notes
    assert tail.unit == ("nats per token" if shifted else "nats per example")
    for scale, found in ((1.0, tail.original), (3.0, tail.swapped)):
        scores = rows.double().numpy()[labels != -100] * scale
        chosen = np.take_along_axis(scores, labels[labels != -100].numpy()[:, None], 1)[:, 0]
        losses = np.log(np.exp(scores).sum(1)) - chosen
        assert tail.losses == len(losses)
        wanted = [np.quantile(losses, q, method="inverted_cdf") for q in SHARES.values()]
        np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-5)


def test_data_that_a_model_cannot_take_is_left_out_with_the_reason() -> None:
    class Features(Scores):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
            return {"features": x[None]}

    data = {f"{name} data": Columns("", {x: torch.zeros(2, 4)}) for name, x in (("odd", "y"), ("fine", "x"))}
    tails, notes = tails_of(Scores(1.0), Scores(1.0), data, Processes())
    assert [tail.data for tail in tails] == ["fine data"]
    assert notes[0].startswith("no tails on odd data: ")
    tails, notes = tails_of(Features(1.0), Features(1.0), {"fine data": data["fine data"]}, Processes())
    assert (tails, notes) == ((), ("no tails on fine data: the model gives no scores of classes",))


def test_odd_text_is_what_it_says() -> None:
    source = open_source("demo:gpt2")
    wanted = wanted_by(source, source.skeleton())
    ids = torch.randint(100, 2048, (20, 64), generator=torch.Generator().manual_seed(0))
    data = Columns("text", {"input_ids": ids, "labels": ids}, shifted=True)
    found = {one.name: one for one in adversarial(wanted, data, data)}
    assert list(found) == ["one token repeated", "long runs", "rare tokens", "other scripts"]
    rows = {name: one.batch(list(range(len(one)))) for name, one in found.items()}
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in rows.values())
    assert all(row["input_ids"].shape[1] == 64 for row in rows.values())
    repeated, runs, rare = (rows[name]["input_ids"] for name in list(found)[:3])
    assert len(repeated) == EXAMPLES
    assert torch.equal(repeated, repeated[:, :1].expand_as(repeated))
    assert torch.equal(runs.reshape(EXAMPLES, -1, RUN), runs.reshape(EXAMPLES, -1, RUN)[..., :1].expand(-1, -1, RUN))
    assert not set(rare.flatten().tolist()) & set(ids.flatten().tolist())
    again = adversarial(wanted, data, data)
    assert torch.equal(again[2].batch([0])["input_ids"], rows["rare tokens"]["input_ids"][:1])


def test_odd_images_have_the_values_that_pixels_have() -> None:
    source = open_source("demo:vit")
    wanted = wanted_by(source, source.skeleton())
    data = Columns("images", {"x": torch.rand(20, 1, 8, 8) * 3 - 1, "labels": torch.zeros(20, dtype=torch.int64)})
    low, high = (float(f(data.columns["x"])) for f in (torch.min, torch.max))
    found = adversarial(wanted, data, data)
    assert [one.name for one in found] == ["noise", "black and white noise", "constant images"]
    for one in found:
        x = one.batch(list(range(EXAMPLES)))["x"]
        assert not one.labelled
        assert x.shape == (EXAMPLES, 1, 8, 8)
        assert low <= float(x.min()) < float(x.max()) <= high
    assert all(len(image.unique()) == 1 for image in found[2].batch(list(range(EXAMPLES)))["x"])
    more = Columns("images", data.columns | {"prompt": torch.zeros(20, 3)})
    assert adversarial(wanted, data, more) == []


def test_a_swap_reports_its_tails_and_is_refused_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, files = tmp_path / "out", ["--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.html")]
    begin = ["swap", "--method", "un", "demo:vit", str(out), "--data", "demo:", "--calibration", "64", "--no-fuse"]
    train = [*begin, "--steps", "2", "--batch-size", "8", "--lr", "1e-6"]
    assert run([*train, "--guard-tails", "1.01", *files]) == 1
    error = capsys.readouterr().err
    assert "--guard-tails allows 1.01 times; nothing was written" in error
    assert "--resume" in error
    assert not out.exists()
    assert json.loads((tmp_path / "a.json").read_text())["exit_status"] == 1
    # Not a step is taken again: the trained state was kept.
    assert run([*train, "--guard-tails", "1000000", "--resume", *files]) == 0
    shown = capsys.readouterr()
    assert "step 1/2" not in shown.err
    assert "losses, original → swapped" in shown.out
    assert "nats per example" in shown.out
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["steps"] == 2
    assert [row["data"] for row in document["tails"][1:]] == ["noise", "black and white noise", "constant images"]
    held: dict[str, Any] = document["tails"][0]
    assert held["data"] == "held-out data"
    assert held["losses"] == 360
    assert held["swapped"]["max"] >= held["swapped"]["99 %"] >= held["swapped"]["50 %"] > 0
    assert "Worst losses, original → swapped" in (tmp_path / "a.html").read_text()
    assert "losses on constant images, nats per example" in (out / "README.md").read_text()


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 1, 8, 8)}, tmp_path / "a.safetensors")
    for limit in (0.5, math.nan, math.inf):
        with pytest.raises(InputError, match=r"guard_tails is .*; expected a number of 1 or more"):
            normconvert.swap("demo:vit", tmp_path / "out", "un", data="demo:", guard_tails=limit)
