"""The tool for whoever has a GPU for ten minutes: its first real run must not fail on a typo, nor lose what it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from normconvert.benchmark.timing import Spread
from normconvert.verification.algebra import algebra_model
from tests.support.perturb import perturb
from tools.benchmarks.gpu import conversion, pages
from tools.benchmarks.gpu.__main__ import main
from tools.benchmarks.gpu.groups import GROUPS, set_up
from tools.benchmarks.gpu.models import work_of
from tools.benchmarks.gpu.rows import FAILED, OK, SKIPPED, Results, Row, unmeasured
from tools.benchmarks.gpu.running import run
from tools.benchmarks.gpu.shapes import SHAPES, build, edited, plans_of, relative
from tools.benchmarks.gpu.tasks import START, Setting, Task, ordered, that_fit
from tools.docs.pages import sections

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SETTING = Setting(CPU, small=True, seconds=0.05)
ABOUT: dict[str, Any] = {
    "machine": {"processor": "CPU", "gpu": "GPU", "threads": 1, "torch": "2", "transformers": "5"},
    "versions": {"timm": "1"},
    "small": False,
    "command": "first",
}
SMALL = [sys.executable, "-m", "tools.benchmarks.gpu", "--small", "--device", "cpu", "--json"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def row(**changes: Any) -> Row:
    """A row as a measurement leaves it."""
    spread = Spread(2.0, 1.0, 3.0)
    task = Task("models", "gpt2", "decode", 1, 128, "graphs")
    measured = Row(
        "models", task.name, task.settings, OK, milliseconds={"original": spread, "rmsnorm": spread},
        speedup={"rmsnorm": Spread(1.25, 1.2, 1.3)}, peak_bytes={"original": 2_000_000, "rmsnorm": 1_000_000},
        failures={"crmsnorm": "RuntimeError: no"}, rounds=5, calls=2,
    )  # fmt: skip
    return replace(measured, **changes)


@pytest.mark.slow
def test_every_code_path_runs_in_small(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = subprocess.run([*SMALL, str(file)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    rows = [Row.from_json(data) for data in document["rows"]]
    tasks = ordered(GROUPS.values(), small=True)
    assert [(r.group, r.name) for r in rows] == [(t.group, t.name) for t in tasks]
    assert {r.group for r in rows} == set(GROUPS)
    for found, task in zip(rows, tasks, strict=True):
        assert found.status == (SKIPPED if task.mode == "graphs" else OK), f"{found.name}: {found.reason}"
        missing = {} if found.group != "norm" else {"liger": "liger-kernel is not installed"}
        assert found.failures in ({}, missing), found.name
    versions = {name for r in rows for name in r.milliseconds}
    assert {"rmsnorm", "rmsnorm --fold", "crmsnorm", "bound", "un", "repbn", "converted", "torch.fx"} <= versions
    assert {r.settings["mode"] for r in rows if r.group == "models"} == {"eager", "compiled", "graphs"}
    assert file.stat().st_size < 2_000_000


def test_the_small_rows_cover_the_kinds_of_the_real_ones() -> None:
    def kinds(small: bool) -> set[tuple[str, str, str]]:
        return {(t.group, t.kind, t.layout) for t in ordered(GROUPS.values(), small)}

    assert kinds(small=True) == kinds(small=False)


@pytest.mark.parametrize("subject", list(SHAPES))
def test_the_real_shapes_can_do_what_is_asked_of_them(subject: str) -> None:
    skeleton = build(subject, False, torch.float32, torch.device("meta"))
    asked = {(task.kind, task.length) for task in ordered([GROUPS["models"]], small=False) if task.subject == subject}
    assert asked or subject == conversion.WHOLE
    for kind, length in asked:
        assert work_of(skeleton, Task("models", subject, kind, 2, length)).kind == kind


def test_a_run_that_is_killed_keeps_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [*SMALL, str(file), "--only", "norm", "conversion"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not file.exists():
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    rows = [Row.from_json(data) for data in json.loads(file.read_text())["rows"]]
    assert 1 <= len(rows) < 5
    assert all(found.status == OK for found in rows)


def test_the_plan_fits_into_eight_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    every = ordered(GROUPS.values(), small=False)
    assert len({(t.group, t.name) for t in every}) == len(every), "a row would replace another"
    chosen = that_fit(every, set_up, 480)
    first = [task for group in GROUPS.values() for task in group.tasks(False)[0]]
    assert [task for task, _ in chosen][: len(first)] == first, "no group's first rows are left out"
    assert START + sum(seconds for _, seconds in chosen) <= 480
    assert main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(chosen) + 3
    seconds = [float(line.split()[0]) for line in lines]
    assert seconds[-2] == pytest.approx(sum(seconds[:-2]), abs=0.06 * len(lines))
    assert seconds[-2] <= 480


def test_without_a_gpu_it_says_so_and_leaves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["--json", str(tmp_path / "rows.json")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "cuda" in said.err
    assert not list(tmp_path.iterdir())


def test_a_failure_is_a_row_and_the_rest_goes_on() -> None:
    results = Results(None, ABOUT)
    tasks = [
        Task("models", "no such model"),
        Task("models", "no such model", batch=8),
        Task("models", "vit-b", length=8),
        Task("models", "vit-b"),
        Task("models", "vit-b", mode="graphs"),
    ]
    run([(task, 1.0) for task in tasks], SETTING, results, time.monotonic() + 600, lambda line: None)
    found = list(results.rows.values())
    assert [r.status for r in found] == [FAILED, FAILED, FAILED, OK, SKIPPED]
    assert found[0].reason == found[1].reason == "RuntimeError: could not be built: KeyError: 'no such model'"
    assert "takes no text" in found[2].reason
    assert "CUDA" in found[4].reason


def test_a_row_that_outlasts_the_time_is_given_up() -> None:
    results = Results(None, ABOUT)
    tasks = [Task("models", "vit-b", batch=8), Task("models", "vit-b", batch=1)]
    setting = replace(SETTING, seconds=1e9)
    start = time.monotonic()
    run([(task, 1.0) for task in tasks], setting, results, start + 4, lambda line: None)
    assert time.monotonic() - start < 60
    assert [r.status for r in results.rows.values()] == [SKIPPED, SKIPPED]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_rows_of_the_same_machine_stay_until_they_are_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first = Results(file, ABOUT)
    first.add(row())
    first.add(row(name="other"))
    again = Results(file, {**ABOUT, "command": "second"})
    task = Task("models", "gpt2", "decode", 1, 128, "graphs")
    again.add(unmeasured(task, SKIPPED, "the time was up"))
    again.add(row(name="other", rounds=7))
    document = json.loads(file.read_text())
    assert [Row.from_json(data) for data in document["rows"]] == [row(), row(name="other", rounds=7)]
    assert document["commands"] == ["first", "second"]
    elsewhere = Results(file, {**ABOUT, "machine": {**ABOUT["machine"], "gpu": "another"}})
    elsewhere.add(row(name="third"))
    assert [data["name"] for data in json.loads(file.read_text())["rows"]] == ["third"]


def test_the_pages_take_their_rows_from_a_file(tmp_path: Path) -> None:
    for page in ("performance.md", "swap.md"):
        (tmp_path / page).write_text("# Title\n\nText.\n")
    pages.write_pages(tmp_path, None)
    for page in ("performance.md", "swap.md"):
        before, found = sections((tmp_path / page).read_text())
        assert before == "# Title\n\nText.\n"
        assert "not measured" in found["gpu"]
        assert pages.COMMAND in found["gpu"]
    results = Results(None, ABOUT)
    results.add(row())
    results.add(row(name="broken", status=FAILED, reason="OutOfMemoryError: a | b", milliseconds={}, speedup={}))
    times = {"original": Spread(1.4, 1.4, 1.4), "un": Spread(1.0, 1.0, 1.0)}
    results.add(row(group="swap", name="vit-b", milliseconds=times, speedup={"un": Spread(1.4, 1.3, 1.5)}))
    pages.write_pages(tmp_path, results.document())
    text = sections((tmp_path / "performance.md").read_text())[1]["gpu"]
    assert "GPU" in text
    assert "timm 1; made by `first`" in text
    assert "| 2 (1 to 3) | 1.250 × ±0.050 | not measured | 2.0 MB, rmsnorm 0.500 × |" in text
    assert "failed: OutOfMemoryError: a \\| b" in text
    assert "vit-b" not in text
    assert "1.400 × ±0.100" in (tmp_path / "swap.md").read_text()


@pytest.mark.parametrize("name", ["gpt2", "vit-b"])
def test_a_version_computes_what_the_conversion_proves(name: str) -> None:
    model = perturb(build(name, True, torch.float64, CPU)).eval()
    inputs = torch.randint(0, 400, (2, 8)) if name == "gpt2" else torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plans = plans_of(name, True)
    assert set(plans) == {"rmsnorm", "rmsnorm --fold", "crmsnorm"}

    def output(network: torch.nn.Module) -> torch.Tensor:
        found: Any = network(inputs)
        tensor: torch.Tensor = getattr(found, "logits", found)
        return tensor

    before = {key: value.clone() for key, value in model.state_dict().items()}
    for plan in plans.values():
        assert relative(output(edited(model, plan)), output(model)) < 1e-10
        assert relative(output(edited(model, plan)), output(algebra_model(model, plan))) < 1e-10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
