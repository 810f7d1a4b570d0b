"""The benchmark: fair by its construction, with a bound that has no norms, and errors before any work."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconvert
from normconvert.benchmark.bound import without_norms
from normconvert.benchmark.compare import compare
from normconvert.benchmark.lockstep import lockstep, parts
from normconvert.benchmark.memory import parameter_bytes, peak_bytes
from normconvert.benchmark.result import Row, row_of, share_of
from normconvert.benchmark.steps import make_step
from normconvert.benchmark.timing import LONG, ROUNDS, Step, interleave, spread, warm_up
from normconvert.benchmark.versions import own_memory, versions
from normconvert.benchmark.workloads import STEPS, Workload, grid, on_device
from normconvert.cli import run
from normconvert.errors import InputError, NothingToConvert
from normconvert.sources import open_source
from tests.support.tiny_checkpoints import gpt2, save

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny language model with 64 positions, and its conversion."""
    folder = tmp_path_factory.mktemp("bench")
    source = save(gpt2(n_positions=64), folder / "src")
    normconvert.convert(source, folder / "out", verify=False)
    return source, folder / "out"


# -- timing ---------------------------------------------------------------------------------------------------------


def test_each_round_times_everybody_and_begins_with_another() -> None:
    seen: list[str] = []
    steps = {name: Step(lambda name=name: seen.append(name), most=1) for name in "abc"}  # type: ignore[misc]
    times, calls = interleave(steps, CPU, seconds=1e-9)
    assert calls == 1
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", ROUNDS[0])
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_quick_calls_are_timed_together_and_prepared_for_each_time() -> None:
    log: list[str] = []
    step = Step(lambda: log.append("call"), lambda: log.append("prepare"), most=7)
    _, calls = interleave({"original": step}, CPU, seconds=1e-9, quickest=1e-6)
    assert calls == 7
    assert "".join(entry[0] for entry in log) == ("p" + 7 * "c") * ROUNDS[0]


def test_what_takes_long_is_warmed_up_less() -> None:
    log: list[str] = []

    def wait() -> None:
        log.append("slow")
        time.sleep(LONG + 0.01)

    quick, slow = Step(lambda: log.append("quick")), Step(wait)
    assert warm_up(quick, CPU) < LONG < warm_up(slow, CPU, done=1)
    assert (log.count("quick"), log.count("slow")) == (3, 1)


class Layered(nn.Module):
    """Layers that note when they run; the last of them may sleep."""

    def __init__(self, name: str, log: list[str], seconds: float = 0.0) -> None:
        super().__init__()
        self.name, self.log, self.seconds = name, log, seconds
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.log.append(f"{self.name}{i}")
        time.sleep(self.seconds)
        return x


def test_versions_take_turns_within_a_call() -> None:
    log: list[str] = []
    models = {name: Layered(name, log) for name in "ab"}
    x, results = torch.randn(2, 4), dict[str, list[Tensor]](a=[], b=[])
    expected = {name: model(x) for name, model in models.items()}
    log.clear()
    steps = {n: Step(lambda n=n: results[n].append(models[n](x)), most=1) for n in "ab"}  # type: ignore[misc]
    times, calls = lockstep(models, steps, 1e-9, 1e-3)
    assert calls == 1
    assert log[:6] == ["a0", "b0", "b1", "a1", "a2", "b2"] or log[:6] == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert len(log) == 6 * ROUNDS[0]
    assert {name: len(values) for name, values in times.items()} == {"a": ROUNDS[0], "b": ROUNDS[0]}
    assert all(torch.equal(result, expected[name]) for name in "ab" for result in results[name])
    assert not any(module._forward_pre_hooks for model in models.values() for module in model.modules())


def test_time_within_a_call_is_counted_where_it_is_spent() -> None:
    models = {"quick": Layered("q", []), "slow": Layered("s", [], seconds=0.02)}
    steps = {name: Step(lambda m=model: m(torch.zeros(1, 4))) for name, model in models.items()}  # type: ignore[misc]
    moved: list[int] = []
    times, calls = lockstep(models, steps, 0.5, 0.005, lambda: moved.append(1), laps=3)
    assert calls == 2
    assert all(0.02 <= t < 0.04 for t in times["slow"][1:4])
    assert max(times["quick"][1:4]) < 0.01
    assert len(moved) == 2


def test_an_error_within_a_call_leaves_no_hooks() -> None:
    models = {name: Layered(name, []) for name in "ab"}
    bad = models["b"].layers[1]
    bad.register_forward_hook(lambda *_: 1 / 0)
    steps = {name: Step(lambda m=model: m(torch.zeros(1, 4))) for name, model in models.items()}  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        lockstep(models, steps, 0.1, 1e-3)
    assert not any(module._forward_pre_hooks for model in models.values() for module in model.modules())


def test_long_layers_are_left_at_their_linear_maps() -> None:
    model = Layered("a", [])
    assert parts(model, 0.01) == list(model.layers)
    assert [type(part) for part in parts(model, 1.0)] == 3 * [nn.Sequential] + 3 * [nn.Linear]
    assert parts(nn.Linear(2, 2), 1.0) == []


@pytest.mark.parametrize("installed", [True, False])
def test_without_greenlet_calls_follow_each_other(
    pair: tuple[Path, Path], installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normconvert.benchmark import compare as module

    used: list[str] = []

    def noted(*arguments: Any) -> Any:
        used.append("lockstep")
        return lockstep(*arguments)

    monkeypatch.setattr(module, "lockstep", noted)
    if not installed:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    source = open_source(str(pair[0]))
    work = grid(source.skeleton(), [1], [8])[0]
    models = {"original": source.load(dtype=FLOAT).eval(), "converted": normconvert.load(pair[1]).eval()}
    row = compare(models, work, "eager", FLOAT, CPU, 0.01)
    assert row.rounds >= ROUNDS[0]
    assert used == ["lockstep"] * installed


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that gets slower by the round does not blur what is twice as fast in each."""
    original = [1.0, 2.0, 4.0, 8.0, 16.0]
    times = {"original": original, "converted": [t / 2 for t in original], "bound": [t / 4 for t in original]}
    row = row_of("eager", "forward", 1, 32, times, 1, {}, {})
    assert row.speedup["converted"] == spread([2.0] * 5)
    assert row.milliseconds["original"].median == 4000
    assert row.milliseconds["original"].low == 2000
    assert row.share == pytest.approx(2 / 3)
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_the_share_of_the_way_is_one_of_time_saved() -> None:
    assert share_of(2.0, 2.0) == 1
    assert share_of(1.0, 1.1) == 0
    assert share_of(1 / 0.95, 1 / 0.9) == pytest.approx(0.5)
    small = {"original": [1.0], "converted": [1.0], "bound": [0.98]}
    assert row_of("eager", "forward", 1, None, small, 1, {}, {}).share is None


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    parameter = torch.ones(1000)

    def call() -> Tensor:
        first = parameter * 2  # 4000 bytes
        second = first + 1  # 8000
        del first  # 4000
        second.add_(1)
        third = second.view(10, 100).exp()  # 8000
        return third.sum()  # 8004

    assert peak_bytes(call, CPU) == 8004
    assert peak_bytes(lambda: parameter.view(10, 100), CPU) == 0


def test_a_version_that_fails_is_named_and_the_others_count() -> None:
    class Broken(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            raise ValueError("no such size\nmore")

    work = Workload("forward", 2, None, {"input": torch.ones(2, 3)})
    row = compare({"original": nn.ReLU(), "bound": Broken()}, work, "eager", FLOAT, CPU, 1e-9)
    assert row.failures == {"bound": "ValueError: no such size"}
    assert set(row.milliseconds) == {"original"}
    row = compare({"original": Broken(), "bound": nn.ReLU()}, work, "eager", FLOAT, CPU, 1e-9)
    assert not row.milliseconds
    assert set(row.failures) == {"original"}


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
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0: expected numbers from 1 on"),
        (["--length", "4,x"], "--length 4,x: expected numbers from 1 on"),
        (["--length", "1000"], "length 1000 is more than the 64 tokens"),
        (["--seconds", "0"], "seconds is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--graphs"], "graphs are CUDA's"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--method", "polish"], "unknown method 'polish'"),
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
