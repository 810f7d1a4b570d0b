"""The benchmark: fair by its construction, with a bound that has no norms, and errors before any work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.memory import parameter_bytes
from normconvert.benchmark.result import Row
from normconvert.benchmark.steps import make_step
from normconvert.benchmark.timing import ROUNDS, Spread
from normconvert.benchmark.versions import own_memory, versions
from normconvert.benchmark.workloads import STEPS, grid, on_device
from normconvert.cli import run
from normconvert.errors import InputError, NothingToConvert
from normconvert.sources import open_source

CPU = torch.device("cpu")
FLOAT = torch.float32


# -- the bound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1 << 40, 0], ids=["ample memory", "little memory"])
def test_the_bound_has_no_norm_and_else_what_the_original_has(
    pair: tuple[Path, Path], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=memory))
    source = open_source(str(pair[0]))
    plan = normconvert.inspect(pair[0]).plan
    work = grid(source.skeleton(), [2], [8])[-1]
    models = versions(source, pair[1], plan, work, FLOAT, CPU)
    assert list(models) == ["original", "converted", "bound"]
    kinds = {name: [type(m).__name__ for m in model.modules()] for name, model in models.items()}
    assert kinds["original"].count("LayerNorm") == kinds["converted"].count("RMSNorm") == len(plan.verdicts) == 5
    assert kinds["bound"].count("Removed") == 5
    assert not {"LayerNorm", "RMSNorm"} & {*kinds["bound"], *kinds["original"]} - {"LayerNorm"}
    assert "LayerNorm" not in kinds["bound"]
    original, bound = models["original"].state_dict(keep_vars=True), models["bound"].state_dict(keep_vars=True)
    assert {name for name in original if name not in bound} == {n for n in original if "ln_" in n}
    assert all((bound[name] is original[name]) == (memory == 0) for name in bound)
    assert all(torch.equal(bound[name], original[name]) for name in bound)
    with torch.no_grad():
        outputs = {name: model(**work.inputs).logits for name, model in models.items()}
    assert outputs["bound"].shape == outputs["original"].shape
    assert torch.allclose(outputs["converted"], outputs["original"], atol=1e-4)
    assert not torch.allclose(outputs["bound"], outputs["original"], atol=1e-1)
    sizes = {name: parameter_bytes(model) for name, model in models.items()}
    assert sizes["bound"] == sizes["original"] - 5 * 2 * 48 * 4
    assert sizes["converted"] == sizes["original"]


def test_norms_that_the_plan_keeps_stay_in_the_bound(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    source, plan = open_source(str(tmp_path / "bert")), normconvert.inspect(tmp_path / "bert").plan
    bound = versions(source, None, plan, grid(source.skeleton(), [1], [5])[0], FLOAT, CPU)["bound"]
    kinds = [type(m).__name__ for m in bound.modules()]
    assert (kinds.count("Removed"), kinds.count("LayerNorm")) == (1, 4)


def test_an_activation_that_came_with_the_norm_stays() -> None:
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)).eval()
    plan_rows = [{"op": "absorb", "path": "1", "keep": ["drop", "act"]}]
    x = torch.randn(2, 3, 5, 5)
    bound = without_norms(model, ["1"], plan_rows, lambda m: m(x))
    assert torch.equal(bound(x), torch.relu(model[0](x)))
    assert isinstance(model[1], BatchNormAct2d)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_what_follows_a_removed_norm_finds_memory_as_it_was(memory: torch.memory_format) -> None:
    from timm.layers import LayerNorm2d

    model = nn.Sequential(nn.Identity(), LayerNorm2d(4)).eval()
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=memory)
    bound = without_norms(model, ["1"], [], lambda m: m(x))
    assert torch.equal(bound(x), x)
    assert bound(x).stride() == model(x).stride()
    with pytest.raises(InputError, match=r"no module 'head\.norm'"):
        without_norms(model, ["head.norm"], [], lambda m: m(x))


def test_versions_lie_in_memory_of_their_own_and_stay_tied() -> None:
    flat = torch.arange(101, dtype=torch.float32)[1:]  # begins at no multiple of 16 bytes
    model = nn.ModuleDict({"a": nn.Linear(10, 10, bias=False), "b": nn.Linear(10, 10, bias=False)})
    model["a"].weight = model["b"].weight = nn.Parameter(flat.view(10, 10))
    own_memory(model)
    first, second = model["a"].weight, model["b"].weight
    assert first is second
    assert isinstance(first, Tensor)
    assert first.data_ptr() % 16 == 0
    assert torch.equal(first.flatten(), flat)


# -- workloads ------------------------------------------------------------------------------------------------------


def test_the_grid_suits_the_model(pair: tuple[Path, Path]) -> None:
    text = open_source(str(pair[0])).skeleton()
    assert [w.name for w in grid(text)] == [
        *["decode 1 × 32", "forward 1 × 32", "forward 1 × 64"],
        *["decode 8 × 32", "forward 8 × 32", "forward 8 × 64"],
    ]
    assert [w.name for w in grid(text, [3], [5], decode=False)] == ["forward 3 × 5"]
    assert grid(text, [3], [5])[1].inputs["input_ids"].shape == (3, 5)
    images = open_source("demo:vit").skeleton()
    assert [w.name for w in grid(images)] == ["forward 1", "forward 8"]
    assert grid(images)[1].inputs["x"].shape[0] == 8
    with pytest.raises(InputError, match="takes no text"):
        grid(images, lengths=[3])
    with pytest.raises(InputError, match="65 is more than the 64 tokens"):
        grid(text, lengths=[65])


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_decoded_token_is_the_next_one_however_often_the_cache_is_set_back(
    pair: tuple[Path, Path], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "static":  # the steps that a compiled model takes, without waiting for the compiler
        monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    model: Any = open_source(str(pair[0])).load()
    work = next(w for w in grid(model, [2], [7]) if w.kind == "decode")
    step = make_step(model, work, "compiled" if mode == "static" else "eager", FLOAT, CPU)
    assert step.most == STEPS
    ids = work.inputs["input_ids"]
    longer = torch.cat([ids, ids[:, -1:], ids[:, -1:]], 1)
    with torch.no_grad():
        truth = model(longer, use_cache=False).logits
        for _ in range(2):
            step.prepare()
            for place in (7, 8):
                output: Any = step.call()
                assert torch.allclose(output.logits[:, -1], truth[:, place], atol=1e-5)


def test_inputs_are_cast_for_the_model() -> None:
    moved = on_device({"ids": torch.ones(1, dtype=torch.int64), "x": torch.ones(1), "flag": False}, torch.float16, CPU)
    assert moved["ids"].dtype == torch.int64
    assert moved["x"].dtype == torch.float16
    assert moved["flag"] is False


# -- the command ----------------------------------------------------------------------------------------------------

ROW_KEYS = {
    *["mode", "kind", "batch", "length", "milliseconds", "speedup", "peak_bytes"],
    *["rounds", "calls", "failures", "share"],
}


def test_the_command_measures_all_three(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, out = map(str, pair)
    options = ["--seconds", "0.01", "--batch", "1,2", "--length", "4", "--json", "-"]
    assert run(["bench", source, out, *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {
        *["command", "source", "converted", "library", "architecture", "method", "norms", "device", "dtype"],
        *["machine", "parameter_bytes", "rows", "exit_status", "command_line"],
    }
    assert document["norms"] == {"converted": 5, "total": 5}
    assert document["machine"].keys() >= {"processor", "threads", "torch", "transformers"}
    names = [(r["mode"], r["kind"], r["batch"], r["length"]) for r in document["rows"]]
    assert names == [("eager", kind, batch, 4) for batch in (1, 2) for kind in ("decode", "forward")]
    for row in document["rows"]:
        assert set(row) == ROW_KEYS
        assert row["milliseconds"].keys() == row["peak_bytes"].keys() == {"original", "converted", "bound"}
        assert row["speedup"].keys() == {"converted", "bound"}
        assert all(s["low"] <= s["median"] <= s["high"] for s in row["milliseconds"].values())
        assert row["rounds"] >= ROUNDS[0]
        assert min(row["peak_bytes"].values()) > 0
        assert not row["failures"]


def test_without_a_conversion_the_command_shows_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "demo:vit", "--seconds", "0.01", "--batch", "1"]) == 0
    shown = capsys.readouterr().out
    assert "bound" in shown
    assert "converted" not in shown
    assert "9 of 9 (rmsnorm)" in shown
    assert "forward 1" in shown


def test_batch_norms_are_a_bound_too(tmp_path: Path) -> None:
    normconvert.convert("demo:convnet", tmp_path / "out", "fuse-bn", verify=False)
    result = normconvert.bench("demo:convnet", tmp_path / "out", batch=[1], seconds=0.01)
    assert result.method == "fuse-bn"
    assert set(result.rows[0].speedup) == {"converted", "bound"}
    assert result.parameter_bytes["bound"] < result.parameter_bytes["original"]
    alone = normconvert.bench("demo:convnet", batch=[1], seconds=0.01, dtype="bfloat16")
    assert (alone.method, alone.dtype) == ("fuse-bn", "bfloat16")
    assert alone.norms == result.norms


@pytest.mark.parametrize(
    ("converted", "bound", "share"),
    [
        (Spread(1.10, 1.09, 1.11), Spread(1.20, 1.19, 1.21), 0.545),
        (Spread(0.85, 0.84, 0.86), Spread(1.04, 1.035, 1.045), None),  # slower: no part of the way
        (Spread(1.10, 0.90, 1.30), Spread(1.20, 1.19, 1.21), None),  # scattered
        (Spread(1.04, 1.03, 1.05), Spread(1.05, 1.02, 1.08), None),  # perhaps there is nothing to gain
        (None, Spread(1.20, 1.19, 1.21), None),
    ],
)
def test_a_share_is_said_where_the_times_support_it(
    converted: Spread | None, bound: Spread, share: float | None
) -> None:
    speedup = {"bound": bound} | ({"converted": converted} if converted else {})
    assert Row("eager", "forward", 1, 8, speedup=speedup).share == (share and pytest.approx(share, abs=0.001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0: expected numbers from 1 on"),
        (["--length", "4,x"], "--length 4,x: expected numbers from 1 on"),
        (["--length", "1000"], "length 1000 is more than the 64 tokens"),
        (["--seconds", "0"], "seconds is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--graphs"], "graphs are CUDA's"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--method", "polish"], "'polish' is not one of 'rmsnorm', 'crmsnorm', 'fuse-bn'"),
    ],
)
def test_bad_usage_is_one_line(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["bench", str(pair[0]), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_what_is_no_conversion_of_the_source_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        normconvert.bench(pair[0], tmp_path / "missing")
    with pytest.raises(InputError, match="not converted by normconvert"):
        normconvert.bench(pair[0], pair[0])
    with pytest.raises(InputError, match="expected two checkpoints of one model"):
        normconvert.bench("demo:vit", pair[1])
    copied = tmp_path / "copied"
    normconvert.load(pair[1]).save_pretrained(copied)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"no normconvert\.json"):
        normconvert.bench(pair[0], copied)


def test_nothing_to_gain_is_said_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "llama")
    with pytest.raises(NothingToConvert, match="has no LayerNorm or BatchNorm"):
        normconvert.bench(tmp_path / "llama")
    assert run(["bench", str(tmp_path / "llama"), "--method", "rmsnorm"]) == 3
    assert "nothing to gain" in capsys.readouterr().err


def test_a_benchmark_leaves_both_folders_alone(pair: tuple[Path, Path]) -> None:
    from tests.support.tiny_checkpoints import contents

    before = [contents(folder) for folder in pair]
    normconvert.bench(*pair, batch=[1], length=[4], seconds=0.01, decode=False)
    assert [contents(folder) for folder in pair] == before


@pytest.mark.slow
def test_compiled_rows(pair: tuple[Path, Path]) -> None:
    result = normconvert.bench(*pair, batch=[1], length=[4], seconds=0.01, compile=True)
    rows = [row for row in result.rows if row.mode == "compiled"]
    assert [row.kind for row in rows] == ["decode", "forward"]
    for row in rows:
        assert set(row.speedup) == {"converted", "bound"}, row.failures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_a_gpu(pair: tuple[Path, Path]) -> None:
    result = normconvert.bench(*pair, batch=[1], length=[4], seconds=0.01, graphs=True, device="cuda")
    for row in result.rows:
        assert set(row.speedup) == {"converted", "bound"}, row.failures
        assert row.mode == "graphs" or min(peak or 0 for peak in row.peak_bytes.values()) > 0
    assert [r.mode for r in result.rows] == ["eager", "eager", "graphs", "graphs"]
    assert copy.deepcopy(result) == result
