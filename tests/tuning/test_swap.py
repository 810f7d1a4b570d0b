"""A swap from end to end: calibrated, trained, written, fused, loaded; interrupted and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.options import Options
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.runtime import Affine, Center
from normconvert.sources import open_source
from normconvert.tracing.model_graph import trace_model
from normconvert.tuning.sites import choose, find_sites
from normconvert.tuning.student import make_student, make_teacher

ROOT = Path(__file__).resolve().parents[2]


def layer_norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.LayerNorm) for m in model.modules())


def tokens(folder: Path, count: int = 24, length: int = 16) -> str:
    """Ready inputs for demo:gpt2."""
    file = folder / "tokens.safetensors"
    ids = torch.randint(3, 2048, (count, length), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids, "labels": ids.clone()}, file)
    return f"safetensors:{file}"


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_a_vision_transformer_learns_to_do_without_norms(tmp_path: Path) -> None:
    """The two-minute version of tools/demos/swap_demos.py."""
    report = normconvert.swap("demo:vit", tmp_path / "out", "un", data="demo:", steps=60, batch_size=64)
    before, calibrated, tuned = (report.figures[k].accuracy for k in ("original", "calibrated", "tuned"))
    assert before is not None
    assert calibrated is not None
    assert tuned is not None
    assert tuned > max(calibrated, before - 0.03)
    assert report.left == ()
    assert report.fused is not None
    assert report.fused.passed
    assert report.fused.algebra <= 1e-10
    assert report.fused.rounding_tolerance == 32
    model = normconvert.load(tmp_path / "out")
    assert layer_norms(model) == 0
    assert not any(isinstance(m, Affine) for m in model.modules())
    from normconvert.tuning.data.digits import digits

    images, labels = digits("test")
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).double().mean())
    assert right == pytest.approx(tuned, abs=0.003)
    assert not (tmp_path / "out.training").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Unified Normalization" in card
    assert "up to rounding" not in card


@pytest.mark.parametrize(
    "method", ["repbn", *(pytest.param(m, marks=pytest.mark.slow) for m in ("powernorm", "ln-free"))]
)
def test_the_other_methods_end_without_norms_too(method: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = normconvert.swap("demo:vit", out, method, data="demo:", steps=8, batch_size=32, calibration=64)
    assert report.left == ()
    assert report.fused is not None
    assert report.fused.algebra <= 1e-10
    assert layer_norms(normconvert.load(out)) == 0
    assert [row["mix"] for row in report.trace][-1] == 0


@pytest.mark.slow
def test_a_language_model_without_norms_has_a_bias_at_its_head(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = normconvert.swap("demo:gpt2", out, "un", data=tokens(tmp_path), steps=2, batch_size=4)
    assert report.left == ()
    model: Any = normconvert.load(out)
    assert layer_norms(model) == 0
    assert model.lm_head.bias is not None
    assert model.lm_head.weight is not model.transformer.wte.weight
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = torch.randint(3, 2048, (2, 9))
    torch.testing.assert_close(logits(other, ids), logits(model, ids))
    with pytest.raises(Exception, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("method", ["un", "ln-free"])
def test_unfused_outputs_load_in_unmodified_code(method: str, tmp_path: Path) -> None:
    """A LayerNorm of a large epsilon is the affine map, and the stream it reads is centred."""
    from transformers import GPT2LMHeadModel

    out = tmp_path / "out"
    data = tokens(tmp_path)
    report = normconvert.swap("demo:gpt2", out, method, data=data, steps=3, batch_size=4, fuse=False)
    assert len(report.left) == 9
    model: Any = normconvert.load(out)
    assert sum(isinstance(m, Affine) for m in model.modules()) == 9
    plain = GPT2LMHeadModel.from_pretrained(out)
    assert layer_norms(plain) == 9
    ids = torch.randint(3, 2048, (2, 9))
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    error = (logits(plain, ids) - logits(normconvert.load(out), ids)).norm() / logits(plain, ids).norm()
    assert error < 1e-5


def test_unfused_timm_outputs_are_refused_by_plain_timm(tmp_path: Path) -> None:
    """Its norms would read the weights as LayerNorm's; an output of rmsnorm may be swapped, too."""
    import timm

    normconvert.convert("demo:vit", tmp_path / "rms", "rmsnorm", verify=False)
    out = tmp_path / "out"
    report = normconvert.swap(tmp_path / "rms", out, "un", data="demo:", steps=0, calibration=64, fuse=False)
    assert len(report.swapped) == 9
    assert (report.figures["calibrated"].accuracy or 0) > 0.7
    model = normconvert.load(out)
    assert sum(isinstance(m, Affine) for m in model.modules()) == 9
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{out}", pretrained=True)


def test_some_norms_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = normconvert.swap(
        "demo:vit", out, "repbn", data="demo:", steps=2, norms=("blocks.*.norm2",), calibration=64
    )
    assert report.swapped == tuple(f"blocks.{i}.norm2" for i in range(4))
    assert set(report.left) == {f"blocks.{i}.norm1" for i in range(4)} | {"norm"}
    model = normconvert.load(out)
    assert sum(type(m).__name__ == "RMSNorm" for m in model.modules()) == 5


def sites_of(demo: str) -> list[Any]:
    source = open_source(demo)
    graph = trace_model(source.skeleton())
    return find_sites(graph, plan_rmsnorm(graph, Options()))


def test_the_analysis_says_what_each_norm_feeds() -> None:
    for demo, first, second, last in (("demo:vit", "norm1", "norm2", "norm"), ("demo:gpt2", "ln_1", "ln_2", "ln_f")):
        roles = {site.path: site.role for site in sites_of(demo)}
        assert {r for p, r in roles.items() if p.endswith(first)} == {"attention"}
        assert {r for p, r in roles.items() if p.endswith(second)} == {"mlp"}
        assert {r for p, r in roles.items() if p.rpartition(".")[2] == last} == {"final"}
        assert all(site.mean_free for site in sites_of(demo))


def test_globs_that_match_nothing_name_the_nearest() -> None:
    sites = sites_of("demo:vit")
    with pytest.raises(InputError, match=r"blocks\.0\.norms.*matches no norm; the nearest are blocks\.0\.norm"):
        choose(sites, ["blocks.0.norms"])


def test_streams_stay_centred_while_the_weights_move() -> None:
    source = open_source("demo:vit")
    plan = plan_rmsnorm(trace_model(source.skeleton()), Options())
    teacher = make_teacher(source.load(dtype=torch.float64), plan, torch.float64)
    sites = sites_of("demo:vit")
    student = make_student(teacher, plan, sites, "un")
    for parameter in student.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    means: list[float] = []
    for norm in student.norms.values():
        norm.register_forward_pre_hook(lambda m, args: means.append(float(args[0].detach().mean(-1).abs().max())))
    student.train(False)
    student.model(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert max(means) > 1e-3
    means.clear()
    student.project()
    student.model(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert max(means) < 1e-12


def test_an_operation_at_a_norm_stands_at_its_training_norm_too() -> None:
    source = open_source("demo:vit")
    plan = plan_rmsnorm(trace_model(source.skeleton()), Options())
    centred = {"op": "center", "path": "blocks.1.norm1", "side": "input", "key": "0", "axis": -1}
    plan = replace(plan, modules=[*plan.modules, centred])
    teacher = make_teacher(source.load(dtype=torch.float64), plan, torch.float64)
    student = make_student(teacher, plan, sites_of("demo:vit"), "un")
    hooks = {path: list(norm._forward_pre_hooks.values()) for path, norm in student.norms.items()}
    assert [path for path, found in hooks.items() if found] == ["blocks.1.norm1"]
    assert isinstance(hooks["blocks.1.norm1"][0], Center)


RUN = """
import sys, os, normconvert
def watch(step, steps, shown):
    if step == int(sys.argv[3]):
        os._exit(9)
normconvert.swap("demo:vit", sys.argv[1], "un", data="demo:", steps=6, batch_size=32, calibration=64, fuse=False,
                 batches_between_checkpoints=2, resume=sys.argv[2] == "resume", watch=watch)
"""


def swap_in_a_process(out: Path, mode: str, die_at: int) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", RUN, str(out), mode, str(die_at)], env=environment).returncode


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    assert swap_in_a_process(tmp_path / "whole", "new", -1) == 0
    assert swap_in_a_process(tmp_path / "killed", "new", 5) == 9
    assert not (tmp_path / "killed").exists()
    state = torch.load(tmp_path / "killed.training" / "state.pt", weights_only=True)
    assert state["step"] == 4
    with pytest.raises(InputError, match="was not finished: pass --resume"):
        normconvert.swap("demo:vit", tmp_path / "killed", "un", data="demo:")
    with pytest.raises(InputError, match=r"other settings:\n  method was 'un', is 'repbn'\n  steps was 6, is 1000"):
        normconvert.swap("demo:vit", tmp_path / "killed", "repbn", data="demo:", resume=True)
    assert swap_in_a_process(tmp_path / "killed", "resume", -1) == 0
    whole, killed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not (tmp_path / "killed.training").exists()


def test_divergence_stops_and_names_the_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    status = run(["swap", "ln-free", "demo:vit", str(out), "--data", "demo:", "--steps", "80", "--lr", "100000",
                  "--batch-size", "32", "--calibration", "64", "--checkpoint-every", "10",
                  "--schedule", "none"])  # fmt: skip
    assert status == 1
    error = capsys.readouterr().err
    assert "went astray at step" in error
    assert "the norm `" in error
    assert "went first; the last good state is in" in error
    assert "; --schedule linear lets them go little by little" in error
    assert not out.exists()
    assert (tmp_path / "out.training" / "state.pt").is_file()


FULL = """
import resource, sys, normconvert
def watch(step, steps, shown):
    if step == 3:  # from now on the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    normconvert.swap("demo:vit", sys.argv[1], "un", data="demo:", steps=6, batch_size=32, calibration=64,
                     batches_between_checkpoints=2, watch=watch)
except normconvert.errors.InputError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_last_state(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = tmp_path / "out"
    result = subprocess.run([sys.executable, "-c", FULL, str(out)], env=environment, capture_output=True, text=True)
    assert "cannot be written" in result.stdout
    assert "the last one is kept: go on with --resume" in result.stdout
    state = torch.load(tmp_path / "out.training" / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert sorted(p.name for p in (tmp_path / "out.training").iterdir()) == ["settings.json", "state.pt"]


@pytest.mark.slow
def test_two_processes_see_the_statistics_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """As `accelerate launch` starts them; on CPUs it starts more than one only if it is told that they are GPUs."""
    common = ["-m", "normconvert", "swap", "un", "demo:vit"]
    more = ["--data", "demo:", "--steps", "4", "--no-fuse", "--calibration", "64", "--quiet", "--lr", "1e-4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    one = [sys.executable, *common, str(tmp_path / "one"), *more, "--batch-size", "64"]
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
           "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *common,
           str(tmp_path / "two"), *more, "--batch-size", "32"]  # fmt: skip
    for command in (one, two):
        assert subprocess.run(command, env=environment, cwd=ROOT).returncode == 0
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert max(float((a[k] - b[k]).norm() / a[k].norm().clamp_min(1e-3)) for k in a) < 1e-3
    # biases of keys have no gradient but rounding, of which Adam makes steps
    assert max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a if "norm" in k) < 1e-5
    records = [json.loads((tmp_path / n / "normconvert.json").read_text()) for n in ("one", "two")]
    assert records[0]["figures"]["tuned"]["agreement"] == pytest.approx(
        records[1]["figures"]["tuned"]["agreement"], abs=0.01
    )


def test_the_command_line_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["swap", "un", "demo:vit", str(out), "--data", "demo:", "--calibrate-only", "--calibration", "64"]
    files = ["--json", str(tmp_path / "report.json"), "--report", str(tmp_path / "report.html")]
    assert run([*arguments, *files]) == 0
    assert "not lossless" in (tmp_path / "report.html").read_text()
    shown = capsys.readouterr()
    assert "calibrating" in shown.err
    assert "0 left to run" in shown.out
    assert "accuracy" in shown.out
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["exit_status"] == 0
    assert document["norms"]["left"] == []
    assert document["figures"]["calibrated"]["features"].keys() == {f"blocks.{i}" for i in range(4)}
