"""`scale`: streams times a power of two, bit for bit the same model, and float16 for one that overflows it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import normconvert
from normconvert.apply.model_card import ORIGINAL
from normconvert.errors import InputError, NothingToConvert
from normconvert.options import Options, powers_in
from normconvert.report.loading import how_to_load
from normconvert.rewrites.planning import difference, plan_model, planned
from normconvert.runtime import apply_module_edits
from normconvert.verification.algebra import algebra_model
from tests.support.basis import check_basis
from tests.support.basis_models import MODELS, built, logits, skeleton

QUICK = {"llama tied", "gemma2", "olmo2", "gpt2"}
ROUNDED = {"gemma", "gemma2"}
"""They add one to the stored weights of norms that take the number."""
UNSTATED = {"opt", "olmo", "deepseek_v2", "deepseek_v3"}
"""No config says the eps of its norms alone; of the second no attribute does, either."""


def models(quick: set[str] = QUICK, without: str = "") -> list[Any]:
    names = [name for name in MODELS if name != without]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", models())
def test_the_model_is_the_same_bit_for_bit(name: str) -> None:
    options = Options(power="3")
    plan, graph = planned(skeleton(name), options, "scale")
    assert [v.reason for v in plan.kept if v.code != "branch"] == []
    assert difference(graph, plan, options) == ""
    assert {row["op"] for row in plan.modules} == {"renew" if name == "olmo" else "epsilon"}
    assert all(row.get("stated", False) for row in plan.modules) is (name not in UNSTATED)
    assert "tie_word_embeddings" not in plan.config
    truth = built(name)
    before = logits(truth, wide=False)
    edited = algebra_model(built(name).double(), plan)
    expected = logits(built(name).double())
    assert float((logits(edited) - expected).norm() / expected.norm()) < 1e-14
    after = logits(edited.float(), wide=False)
    if name in ROUNDED:
        assert any("are rounded anew" in note for note in plan.notes)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)
    changed = sum(not torch.equal(a, b) for a, b in zip(truth.parameters(), edited.parameters(), strict=True))
    assert changed >= 5


def overflowing(tmp_path: Path, name: str, power: int = 16) -> Path:
    """A model as its library saves it, whose stream is so large that float16 cannot hold it."""
    plan = plan_model(skeleton(name), Options(power=str(-power)), "scale")
    model: Any = algebra_model(built(name).double(), plan).float()
    for key, value in plan.config.items():
        setattr(model.config, key, value)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", models({"llama tied"}, without="vit"))
def test_a_stream_that_overflows_float16_comes_back(tmp_path: Path, name: str) -> None:
    source = overflowing(tmp_path, name)
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        assert not AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)(ids).logits.isfinite().any()
    report = normconvert.convert(source, tmp_path / "out", "scale", dtype="float16", verify_level="quick")
    fidelity = report.fidelity
    assert fidelity is not None
    assert fidelity.passed
    assert fidelity.remarks[0].startswith("the original has values that are not finite in float16")
    assert any("goes up to" in note and "of 65,504 in float16" in note for note in report.notes)
    with torch.no_grad():
        if name in UNSTATED:
            model: Any = normconvert.load(tmp_path / "out")
        else:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        found = model(ids).logits
    assert model.dtype == torch.float16
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    # Measured power and all: it can be made again from what the record says.
    assert normconvert.check(tmp_path / "out", source=source).passed
    assert normconvert.verify(source, tmp_path / "out", level="quick").passed


def test_the_stock_class_loads_it_bit_for_bit(tmp_path: Path) -> None:
    built("gpt2").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    report = normconvert.convert(tmp_path / "model", tmp_path / "out", "scale", power="4", verify_level="quick")
    assert report.fidelity is not None
    assert report.fidelity.storage == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out")]
    assert torch.equal(*(logits(model, wide=False) for model in models))
    head, table = models[1].get_output_embeddings().weight, models[1].get_input_embeddings().weight
    assert head is table
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_norm_epsilon"] == 1e-5 * 4.0**-4


def test_where_no_config_says_it_norms_get_their_own_eps(tmp_path: Path) -> None:
    source = overflowing(tmp_path, "opt", power=0)
    first = normconvert.convert(source, tmp_path / "a", "scale", power="6", verify_level="quick")
    assert any("the unmodified class takes the old one" in note for note in first.notes)
    # What is converted a second time needs the first one's eps, too.
    power = f"{first.plan.verdicts[0].path}=1"
    normconvert.convert(tmp_path / "a", tmp_path / "b", "scale", power=power, verify_level="quick")
    third = normconvert.convert(tmp_path / "a", tmp_path / "c", "rotate", verify_level="quick")
    # The library alone would take the old one, whichever conversion came last, and no line says that it loads it.
    for report in (first, third):
        assert all("from_pretrained" not in line or "trust_remote_code" in line for line in how_to_load(report))
        assert ORIGINAL not in (Path(report.out or "") / "README.md").read_text()
    assert normconvert.verify(tmp_path / "a", tmp_path / "c").passed
    assert not normconvert.verify(tmp_path / "c", tmp_path / "a").passed
    truth = AutoModelForCausalLM.from_pretrained(source)
    for name in ("a", "b"):
        assert torch.equal(logits(normconvert.load(tmp_path / name), wide=False), logits(truth, wide=False))
    rotated = logits(normconvert.load(tmp_path / "c", dtype=torch.float64))
    torch.testing.assert_close(rotated, logits(truth.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_streams_of_their_own_take_numbers_of_their_own() -> None:
    plan = plan_model(skeleton("qwen3"), Options(power="model.norm=2,model.layers.1.self_attn.q_norm=5"), "scale")
    exponents = {name: rows[0]["exponent"] for name, rows in plan.tensors.items()}
    assert exponents.pop("model.layers.1.self_attn.q_proj.weight") == -5
    assert set(exponents.values()) == {-2}
    assert not any(row.get("stated") for row in plan.modules)  # one ε of the config serves them all
    kept = {v.path: v.reason for v in plan.kept}
    assert kept["model.layers.0.self_attn.q_norm"] == "its stream fits as it is: it is multiplied by one."
    for power, message in {
        "model.layers.1.q_norm=1": "no norm of that name reads a stream",
        "model.norm=1,model.layers.0.input_layernorm=2": "these norms read streams that take one number",
        "much": "expected a whole number", "1.5": "expected a whole number", "999": "expected numbers from -60 to 60",
        "58": r"--power 58: the ε of `model.layers.0.input_layernorm` would be 1.2e-41, which float32 does not hold",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            plan_model(skeleton("qwen3"), Options(power=power), "scale")


@pytest.mark.parametrize("power", ["99", "-61", "2.5", "much"])
def test_a_power_that_is_none_is_refused_before_anything_is_read(tmp_path: Path, power: str) -> None:
    with pytest.raises(InputError, match=rf"--power {power}: expected "):
        normconvert.convert(tmp_path / "none", tmp_path / "out", "scale", power=power)
    with pytest.raises(InputError, match=rf"--power {power}: expected "):
        normconvert.convert_model(nn.LayerNorm(4), method="scale", power=power)


def test_small_weights_that_would_vanish_are_refused_by_name(tmp_path: Path) -> None:
    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with pytest.raises(
        InputError, match=r"tensor model\.\S+ times 2\^-13 loses 0\.\d+ of its size in float16: choose a"
    ):
        normconvert.convert(tmp_path / "model", tmp_path / "out", "scale", power="13", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_streams_that_fit_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(NothingToConvert, match=r"nothing to scale: the stream that .* goes up to .* see --headroom"):
        normconvert.convert("demo:gpt2", tmp_path / "out", "scale")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    report = normconvert.convert(
        "demo:gpt2", tmp_path / "out", "scale", headroom=1e6, data=f"text:{text}", verify=False
    )
    assert int(report.options["power"]) > 5


@pytest.mark.slow
def test_text_that_the_model_makes_itself_is_measured_on(tmp_path: Path) -> None:
    report = normconvert.convert("demo:gpt2", tmp_path / "out", "scale", headroom=1e6, data="demo:", verify=False)
    assert int(report.options["power"]) > 5


def test_a_norm_is_named_once() -> None:
    with pytest.raises(InputError, match="names a norm twice"):
        powers_in("a.norm=1,a.norm=2")


@pytest.mark.parametrize("how", [{"data": "text:some.txt"}, {"headroom": 8.0}])
def test_how_to_measure_is_refused_where_nothing_is_measured(tmp_path: Path, how: dict[str, Any]) -> None:
    for ask in (
        lambda: normconvert.convert(tmp_path / "model", tmp_path / "out", "scale", power="3", **how),
        lambda: normconvert.inspect(tmp_path / "model", "scale", power="3", **how),
        lambda: normconvert.convert_model(nn.LayerNorm(4), "scale", power="3", **how),
    ):
        with pytest.raises(InputError, match=f"--{next(iter(how))} says .* --power leaves nothing to measure"):
            ask()


def test_a_stream_is_measured_before_its_shards_are_fetched(tmp_path: Path) -> None:
    built("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with pytest.raises(InputError, match="--stream reads the weights once, as they are written: say --power"):
        normconvert.convert(tmp_path / "model", tmp_path / "out", "scale", stream=True)


class Written(nn.Module):
    """What writes into the stream: a layer scale, a norm with a weight, and a linear map of the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gain = nn.Embedding(11, 8), nn.Parameter(torch.empty(8))
        self.first, self.inner, self.after = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-4)
        self.mix, self.last, self.head = nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-3), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.gain * self.inner(self.first(x)) + self.after(self.inner(self.first(x)))
        return self.head(self.last(x + self.mix(x)))


def test_numbers_pass_layer_scales_norms_and_maps_of_the_stream_itself() -> None:
    outcome = check_basis(Written, [{"ids": torch.arange(6).reshape(2, 3)}], "scale", Options(power="7"))
    assert outcome.plan is not None
    assert not outcome.problems
    exponents = {name: rows[0]["exponent"] for name, rows in outcome.plan.tensors.items()}
    names = ("gain", "after.weight", "after.bias", "mix.bias", "mix.weight", "last.weight")
    assert [exponents.get(name) for name in names] == [-7, -7, -7, -7, None, 7]


class Shared(nn.Module):
    """The weight that reads one stream past its norm reads what is no stream, too."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.write(x)
        return self.read(self.norm(stream)) + self.read(stream)


def test_a_map_that_reads_more_than_the_stream_keeps_it() -> None:
    outcome = check_basis(Shared, [{"x": torch.randn(2, 5, dtype=torch.float64)}], "scale", Options(power="2"))
    assert outcome.plan is not None
    assert not outcome.problems
    assert "`read` reads it directly, and `read` reads `read.weight`, too" in outcome.plan.kept[0].reason


class Learnt(nn.Module):
    """Learnt queries behind a norm: no input changes them, and more than one norm reads what they become."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.first, self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.branch, self.read = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(self.queries.repeat(x.shape[0], 1, 1))
        stream = stream + stream * self.branch(self.norm(stream))
        return self.read(self.last(stream)) + x.mean()


def test_what_no_input_changes_is_asked_for_its_other_readers() -> None:
    outcome = check_basis(Learnt, [{"x": torch.randn(2, 5, dtype=torch.float64)}], "scale", Options(power="-5"))
    assert outcome.plan is not None
    assert not outcome.problems
    assert any("mul in the model's own forward reads that, too" in v.reason for v in outcome.plan.kept)


def test_another_eps_than_the_plans_is_found() -> None:
    options = Options(power="2")
    plan, graph = planned(skeleton("llama"), options, "scale")
    plan.modules[1]["eps"] *= 2
    assert "have not the ε" in difference(graph, plan, options)


class Literal(nn.Module):
    """A norm whose eps is a number in its code, of the last axis or of images, without its mean or with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gain = kind, nn.Parameter(torch.ones(8))
        if kind == "image":
            self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "image":
            y = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,), self.gain, self.shift, 1e-2)
            return y.permute(0, 3, 1, 2)
        if self.kind == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2) * (1 + self.gain)
        return nn.functional.layer_norm(x, (8,), self.gain, None, 1e-2)


class Renewed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        linear = kind != "image"
        self.write, self.read = (nn.Linear(a, b) if linear else nn.Conv2d(a, b, 1) for a, b in ((5, 8), (8, 3)))
        self.norm = Literal(kind)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.norm(self.write(x)))
        return result


@pytest.mark.parametrize("kind", ["last", "image", "rms"])
def test_a_norm_whose_eps_is_in_its_code_is_renewed(kind: str) -> None:
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64) if kind == "image" else torch.randn(2, 5, dtype=torch.float64)
    outcome = check_basis(lambda: Renewed(kind), [{"x": x}], "scale", Options(power="2"))
    assert outcome.plan is not None
    assert not outcome.problems
    ((row),) = outcome.plan.modules
    assert (row["op"], row["kind"], row["eps"]) == ("renew", "rmsnorm" if kind == "rms" else "layernorm", 1e-2 / 16)


def test_an_edit_of_an_eps_changes_a_number_of_a_norm_and_nothing_else() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    row = {"op": "epsilon", "path": "0", "attributes": ["eps"], "eps": 1e-9}
    apply_module_edits(model, [row])
    assert model[0].eps == 1e-9
    for wrong in ({"attributes": ["normalized_shape"]}, {"attributes": ["eps2"]}, {"eps": -1.0}, {"eps": "0"}):
        with pytest.raises(ValueError, match="module edit"):
            apply_module_edits(model, [{**row, **wrong}])


def test_a_class_that_reads_the_config_elsewhere_too_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = MODELS["llama"][1]
    forward = kind.forward

    def reads_the_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits + self.config.rms_norm_eps
        return found

    monkeypatch.setattr(kind, "forward", functools.wraps(forward)(reads_the_config))
    options = Options(power="2")
    plan, graph = planned(skeleton("llama"), options, "scale")
    assert "has the argument" in difference(graph, plan, options)
