"""What a training heeds: padding, too little data, signs that it goes astray, norms that were changed before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normconvert
from normconvert.cli import run
from normconvert.options import Options
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.sources import open_source
from normconvert.tracing.model_graph import trace_model
from normconvert.tuning import guard
from normconvert.tuning.guard import Guard, worst_part
from normconvert.tuning.norms import TRAINING_NORMS
from normconvert.tuning.sites import find_sites
from normconvert.tuning.student import Student, make_student, make_teacher, measure

METHODS = tuple(TRAINING_NORMS)
ONE = [METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])]
"""A training takes seconds."""


def student_of(demo: str, method: str) -> tuple[Student, nn.Module]:
    """A student in float64, and its teacher."""
    source = open_source(demo)
    graph = trace_model(source.skeleton())
    plan = plan_rmsnorm(graph, Options())
    teacher = make_teacher(source.load(dtype=torch.float64), plan, torch.float64)
    return make_student(teacher, plan, find_sites(graph, plan), method), teacher


def padded(file: Path, garbage: int, left: bool = False) -> str:
    """Texts of several lengths; ``garbage`` is what their padding holds."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 2048, (24, 12), generator=generator)
    lengths = torch.randint(4, 13, (24, 1), generator=generator)
    positions = torch.arange(12).flip(0) if left else torch.arange(12)
    mask = (positions < lengths).long()
    ids = torch.where(mask.bool(), ids, torch.full_like(ids, garbage))
    save_file({"input_ids": ids, "attention_mask": mask}, file)
    return f"safetensors:{file}"


@pytest.mark.parametrize("method", ONE)
def test_what_padding_holds_makes_no_difference(method: str, tmp_path: Path) -> None:
    """To statistics, losses and gradients alike: the weights that are learnt are the same."""
    found, figures = [], []
    for garbage in (1, 1999):
        data = padded(tmp_path / f"{garbage}.safetensors", garbage)
        out = tmp_path / f"out-{garbage}"
        report = normconvert.swap("demo:gpt2", out, method, data=data, steps=3, batch_size=8, lr=1e-3, fuse=False)
        found.append(load_file(out / "model.safetensors"))
        figures.append(report.figures["tuned"])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6 * float(value.abs().max()), msg=name)
    assert figures[0].kl == pytest.approx(figures[1].kl, rel=1e-3)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_calibration_leaves_padding_out(left: bool, tmp_path: Path) -> None:
    """Statistics of padded texts are those of the same texts without padding."""
    student, teacher = student_of("demo:gpt2", "ln-free")
    padded(tmp_path / "a.safetensors", 1999, left)
    columns = load_file(tmp_path / "a.safetensors")
    ids, mask = columns["input_ids"], columns["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = measure(teacher, student.sites, iter([{**columns, "position_ids": positions}]))
    alone = measure(teacher, student.sites, ({"input_ids": i[m.bool()][None]} for i, m in zip(ids, mask, strict=True)))
    for path in whole:
        a, b = vars(whole[path]), vars(alone[path])
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-6, atol=1e-6, err_msg=f"{path} {key}")


@pytest.fixture(scope="module")
def rms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "rms"
    normconvert.convert("demo:vit", folder, "rmsnorm", verify=False)
    return folder


@pytest.mark.parametrize("method", ONE)
def test_models_converted_to_rmsnorm_are_swapped_too(method: str, rms: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = normconvert.swap(rms, out, method, data="demo:", steps=6, batch_size=32, calibration=64)
    assert len(report.swapped) == 9
    assert report.left == ()
    assert report.fused is not None
    assert report.fused.algebra <= 1e-10
    assert report.figures["tuned"].agreement > 0.7
    model = normconvert.load(out)
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]


def test_the_guard_stops_at_what_is_not_finite() -> None:
    assert Guard().look(float("nan"), 0.9, 1.0) == "the loss is nan"
    assert Guard().look(float("inf"), 0.9, 1.0) == "the loss is inf"
    assert Guard().look(1.0, 0.9, float("nan")) == "the gradient is not finite"


def test_the_guard_stops_at_a_collapse_and_not_at_a_dip() -> None:
    one = Guard()
    steps = [0.9] * 40 + [0.05] * 10 + [0.9] * 40
    assert not any(one.look(1.0, agreement, 1.0) for agreement in steps)
    said = [one.look(1.0, 0.05, 1.0) for _ in range(120)]
    assert "the agreement with the original fell from 90.0% to" in next(filter(None, said))
    assert not any(said[: guard.PATIENCE])
    two = Guard()
    assert not any(two.look(0.1, 0.9, 1.0) for _ in range(40))
    assert not any(two.look(loss, 0.9, 1.0) for loss in [50.0] * 10 + [0.1])
    said = [two.look(50.0, 0.9, 1.0) for _ in range(guard.PATIENCE)]
    assert said[-1].startswith("the loss rose from 0.1 to 50")


def test_the_guard_lets_the_loss_rise_from_nothing() -> None:
    """As it does where the old norms fade: the student begins as the teacher."""
    one = Guard()
    losses = [1e-6 * 1.9**i for i in range(21)] + [1.5] * 100
    assert not any(one.look(loss, 0.9, 1.0) for loss in losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [100.0, float("nan")])
def test_the_norm_that_went_first_is_named(method: str, value: float) -> None:
    student, teacher = student_of("demo:vit", method)
    batch = {"x": torch.randn(4, 1, 8, 8, dtype=torch.float64)}
    moments = measure(teacher, student.sites, iter([batch]))
    student.model.double()
    for path, norm in student.norms.items():
        norm.calibrate(moments[path])
    norm = student.norms["blocks.1.norm2"]
    for weight in (norm.weight, getattr(norm, "old_weight", norm.weight)):
        weight.data.mul_(value)
    assert "`blocks.1.norm2`" in worst_part(student, teacher, batch)


def test_a_loss_that_is_not_a_number_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken example among the data; it is met in the second pass over them at the latest."""
    images = torch.randn(16, 1, 8, 8)
    images[9, 0, 3, 3] = float("nan")
    save_file({"x": images}, tmp_path / "a.safetensors")
    out, report = tmp_path / "out", tmp_path / "report.json"
    status = run(["swap", "un", "demo:vit", str(out), "--data", f"safetensors:{tmp_path}/a.safetensors",
                  "--eval-data", "demo:", "--batch-size", "4", "--calibration", "4", "--json", str(report),
                  "--steps", "8"])  # fmt: skip
    assert status == 1
    error = capsys.readouterr().err
    assert "the loss is nan; the norm `blocks.0.norm1`" in error
    assert "went first; the last good state is in" in error
    assert json.loads(report.read_text())["exit_status"] == 1
    assert not out.exists()
    state = torch.load(tmp_path / "out.training" / "state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["model"].values())


@pytest.mark.slow
def test_little_data_is_said_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.randn(2, 1, 8, 8)}, tmp_path / "a.safetensors")
    data = f"safetensors:{tmp_path}/a.safetensors"
    seen: list[str] = []

    def watch(step: int, steps: int, shown: Any) -> None:
        seen.append("step")

    normconvert.swap("demo:vit", tmp_path / "one", "un", data=data, eval_data="demo:", steps=1, batch_size=2,
                     watch=watch, warn=seen.append, fuse=False)  # fmt: skip
    assert seen == ["step"]
    seen.clear()
    normconvert.swap("demo:vit", tmp_path / "two", "un", data=data, eval_data="demo:", steps=101, batch_size=2,
                     watch=watch, warn=seen.append, fuse=False)  # fmt: skip
    assert seen[0] == "little data: each of 2 examples is seen 101 times"
    assert seen[1:] == ["step"] * 101
    status = run(["swap", "un", "demo:vit", str(tmp_path / "three"), "--data", data, "--eval-data", "demo:",
                  "--batch-size", "2", "--steps", "125", "--no-fuse", "--max-minutes", "0.0001"])  # fmt: skip
    assert status == 0
    error = capsys.readouterr().err
    assert error.index("little data: each of 2 examples is seen 125 times") < error.index("training ...")
