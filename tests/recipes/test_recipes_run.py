"""Batches that run: in real processes, killed and run again, skipped, redone, refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normconvert.cli import run
from normconvert.plan.conversion_record import RECORD_FILE
from normconvert.recipes import fingerprint, local, machine, state
from normconvert.recipes.batch import Batch, plan_recipes, run_batch, run_recipes
from normconvert.recipes.job import Event, Job, Resources
from tests.support.recipe_jobs import job_of, look, perform
from tests.support.tiny_checkpoints import contents, talkative
from tools.docs.command_output import alike, lines_of, page_says

RECIPES = Path(__file__).parents[2] / "recipes"
COMMAND = [sys.executable, "-m", "normconvert", "run"]


# The whole thing


def test_the_demo_recipe_converts_and_the_second_run_does_nothing_quickly(tmp_path: Path) -> None:
    command = [*COMMAND, str(RECIPES / "demo.yaml")]
    first = subprocess.run(
        [*command, "--report", "report.html"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert first.returncode == 0, first.stderr + first.stdout
    assert "3 jobs: 3 converted" in first.stdout
    assert "convnet fuse-bn" in (tmp_path / "report.html").read_text()
    assert alike(lines_of(first.stdout), page_says("commands.md", "run recipes/demo.yaml"))
    names = ["convnet-fuse-bn", "gpt2-rmsnorm", "vit-rmsnorm"]
    assert sorted(p.name for p in (tmp_path / "out/demo").iterdir()) == names
    for name in names:
        record = json.loads((tmp_path / "out/demo" / name / RECORD_FILE).read_text())
        assert record["verification"]["passed"] is True
        assert record["method"] == name.partition("-")[2]
    before, used = look(tmp_path), resource.getrusage(resource.RUSAGE_CHILDREN)
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert second.returncode == 0
    assert second.stdout == "3 jobs: nothing to do, every output is up to date\n"
    assert look(tmp_path) == before
    # Processor time, so that a busy machine fails nothing; on an idle one it is the time on the clock.
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime <= 3


def test_nothing_heavy_is_imported_to_find_that_there_is_nothing_to_do(here: Path) -> None:
    assert perform(job_of()).status == "converted"
    code = "import sys; from normconvert.cli import run; status = run(['run', 'r.yaml']); print(status, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, *modules = done.stdout.splitlines()[-1].split()
    assert status == "0"
    assert not {"torch", "transformers", "timm", "ray", "huggingface_hub", "fsspec"} & set(modules)


@pytest.mark.slow
def test_a_batch_that_was_killed_goes_on_where_it_stopped(here: Path) -> None:
    for number in range(6):
        shutil.copytree(here / "model", here / f"models/m{number:02}")
    Path("r.yaml").write_text("sources: [{folder: 'models/*'}]\noutput: out/{name}\n")
    command = [*COMMAND, "r.yaml", "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = here / "out"
    until = time.monotonic() + 300
    while not out.is_dir() or len([p for p in out.iterdir() if not p.name.startswith(".")]) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its workers see that they are alone
    done = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert 2 <= len(done) < 6
    before = {name: look(out / name) for name in done}
    again = subprocess.run([*command, "--json", "report.json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    report = json.loads(Path("report.json").read_text())
    assert report["counts"] == {"converted": 6 - len(done), "skipped": len(done), "failed": 0, "interrupted": 0}
    assert sorted(p.name for p in out.iterdir()) == [f"m{n:02}" for n in range(6)]  # no folders half-way either
    for name, files in before.items():
        assert look(out / name) == files
    expected = {name: data for name, data in contents(out / done[0]).items() if not name.startswith(".cache")}
    for folder in out.iterdir():
        kept = state.read_state(folder)
        assert kept is not None
        assert kept.verified
        assert fingerprint.compare(kept.output_files, folder).same
        assert json.loads((folder / RECORD_FILE).read_text())["verification"]["passed"] is True
        found = {name: data for name, data in contents(folder).items() if not name.startswith(".cache")}
        assert found.keys() == expected.keys()
        assert found["model.safetensors"] == expected["model.safetensors"]


def test_one_failure_stops_nobody_and_the_worst_status_counts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("model", "damaged")
    Path("damaged/model.safetensors").write_bytes(b"not a checkpoint")
    talkative(Path("model"))
    Path("r.yaml").write_text(
        "sources:\n  - damaged\n  - {source: model, method: fuse-bn}\n"
        "  - {source: model, limits: {rounding: 0}, output: out/strict}\n  - model\n"
        "defaults: {trust_remote_code: true}\n"
    )
    assert run(["run", "r.yaml", "-v", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    results = [job["result"] for job in report["jobs"]]
    assert [result["exit_status"] for result in results] == [2, 3, 1, 0]
    for result, words in zip(results, ("safetensors", "has no BatchNorm", "rounding errors are", ""), strict=True):
        assert words in result["message"]
    assert results[3]["norms"] == [3, 3]
    assert sorted(p.name for p in Path("out").iterdir()) == ["model-rmsnorm"]
    assert report["exit_status"] == 1
    for words in ("r.yaml:2:5", "r.yaml:3:5", "r.yaml:4:5", "4 jobs: 1 converted, 3 failed", "hello from the model"):
        assert words in err


def test_ctrl_c_ends_the_workers_and_leaves_nothing_half_way(here: Path) -> None:
    Path("r.yaml").write_text("sources: [model, {source: model, output: second}]\n")
    process = subprocess.Popen([*COMMAND, "r.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    worker = int(process.stderr.readline().split()[-2])  # [0/2] model rmsnorm: process 123 ...
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "2 jobs: 2 interrupted" in out
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert sorted(p.name for p in here.iterdir()) == ["model", "r.yaml"]


def test_a_dry_run_says_what_each_job_would_do_and_how_large_it_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perform(job_of())
    shutil.copytree("out/model-rmsnorm", "out/model-old")
    edited = json.loads(Path("out/model-old", state.STATE).read_text())
    edited["settings"]["min_gain"] = 7
    Path("out/model-old", state.STATE).write_text(json.dumps(edited))
    Path("out/model-mine").mkdir()
    Path("out/model-mine/file").write_text("mine")
    variants = "".join(f"  - {{name: {name}}}\n" for name in ("rmsnorm", "old", "mine", "new"))
    Path("r.yaml").write_text(f"sources: [model]\nmatrix:\n{variants}")
    before = look(here)
    assert run(["run", "r.yaml", "--dry-run"]) == 0
    out, _ = capsys.readouterr()
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith(" model")}
    assert "up to date" in rows["rmsnorm"]
    assert "convert again: min_gain was 7, is not set" in rows["old"]
    assert "refuse: the output exists and was not made by normconvert" in rows["mine"]
    assert rows["new"].split()[2] == "convert"
    size = Path("model/model.safetensors").stat().st_size
    assert all(f"{size / 1000:.1f} kB" in row for row in rows.values())
    assert "2 to be converted" in out
    assert look(here).keys() == before.keys()


# Processes, threads, memory


def sized(*gigabytes: float) -> dict[int, Job]:
    base = Job("s", "n", "v", "/o", "w", "rmsnorm", {})
    return {i: replace(base, resources=Resources(memory=int(g * 1e9))) for i, g in enumerate(gigabytes)}


@given(
    sizes=st.lists(st.integers(0, 12), max_size=12),
    limit=st.integers(12, 24),
    workers=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
)
def test_the_memory_of_all_that_runs_is_never_over_the_limit_and_everything_runs(
    sizes: list[int], limit: int, workers: int, order: Any
) -> None:
    waiting, running, ran = sized(*sizes), dict[int, Job](), list[int]()
    while waiting or running:
        while len(running) < workers:
            index = local.choose(waiting, running.values(), limit * 10**9, in_order=workers == 1)
            if index is None:
                break
            running[index] = waiting.pop(index)
        assert running
        assert sum(job.resources.memory for job in running.values()) <= limit * 10**9
        done = order.choice(list(running))
        ran.append(done)
        del running[done]
    assert sorted(ran) == list(range(len(sizes)))
    assert workers > 1 or ran == sorted(ran)


def doomed(text: str) -> Batch:
    """A batch whose source has gone since it was planned: its jobs fail in their processes, and soon."""
    Path("r.yaml").write_text(text)
    batch = plan_recipes("r.yaml")
    shutil.rmtree("model")
    return batch


@pytest.mark.parametrize(("budget", "at_once"), [(9, 1), (11, 2)])
def test_jobs_that_do_not_fit_beside_each_other_take_turns(here: Path, budget: int, at_once: int) -> None:
    batch = doomed(
        "sources: [{source: model, output: a}, {source: model, output: b}]\ndefaults: {resources: {memory: 5GB}}\n"
    )
    running, most = set[int](), 0

    def listen(batch: Batch, event: Event) -> None:
        nonlocal most
        if event.kind == "start":
            running.add(event.job)
        elif event.kind == "end":
            running.discard(event.job)
        most = max(most, len(running))

    run_batch(batch, jobs=2, memory=budget * 10**9, listen=listen)
    assert batch.count("failed") == 2
    assert most == at_once


def test_a_job_that_memory_cannot_hold_is_refused_and_the_others_run(here: Path) -> None:
    batch = doomed("sources: [{source: model, output: a, resources: {memory: 900GB}}, {source: model, output: b}]\n")
    run_batch(batch, memory=10**11)
    first, second = (entry.result for entry in batch.entries)
    assert first is not None
    assert (first.status, first.exit_status, first.attempts) == ("failed", 2, 0)
    assert "needs about 900.0 GB of memory and 100.0 GB may be used" in first.message
    assert second is not None
    assert second.attempts == 1


def test_a_process_that_dies_fails_its_job_alone(here: Path) -> None:
    batch = doomed("sources: [{source: model, output: a}, {source: model, output: b}]\n")

    def listen(batch: Batch, event: Event) -> None:
        if event.job == 0 and event.kind == "start":
            os.kill(int(batch.entries[0].place.rpartition(" ")[2]), signal.SIGKILL)

    run_batch(batch, listen=listen)
    first, second = (entry.result for entry in batch.entries)
    assert first is not None
    assert (first.status, first.exit_status, first.kind) == ("failed", 2, "ProcessDied")
    assert "signal 9 (SIGKILL); the system may have run out of memory" in first.message
    assert second is not None
    assert second.kind == "FileNotFoundError"
    assert [p.name for p in here.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("cores", "workers", "wish", "share"), [(8, 2, "", "4"), (8, 3, "", "2"), (2, 4, "", "1"), (8, 2, "1", "1")]
)
def test_each_process_gets_its_share_of_the_threads(
    cores: int, workers: int, wish: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in local.THREADS:
        monkeypatch.setenv(name, wish)
    assert local.thread_share(cores, workers) == dict.fromkeys(local.THREADS, share)
    assert machine.cores() >= 1
    assert machine.memory() > 0


def test_a_plan_is_made_without_running_anything(here: Path) -> None:
    Path("r.yaml").write_text("sources: [model]\n")
    batch = plan_recipes("r.yaml")
    assert [entry.decision.action for entry in batch.entries] == ["convert"]
    assert [entry.result for entry in batch.entries] == [None]
    assert run_recipes("r.yaml", dry_run=True).exit_status == 0
    assert not Path("out").exists()


@pytest.mark.parametrize("last", ['{"kind": "sta', "[1]", "null", '"x"', '{"kind": "stage"}'])
def test_a_process_killed_within_a_line_ends_its_job(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """A line that is no event is no reason to wait for ever for the next one."""
    code = f"import os; os.write(1, {last.encode()!r}); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(local, "child_interpreter", lambda *_: [sys.executable, "-c", code])
    events = list(local.execute({0: Job("a", "a", "b", "out", "r", "rmsnorm", {})}))
    assert [event.kind for event in events] == ["start", "end"]
    assert "SIGKILL" in events[-1].data["result"]["message"]


@pytest.mark.slow
def test_a_source_says_which_of_its_weights_are_meant(here: Path) -> None:
    shutil.copy(here / "model/model.safetensors", here / "model/model.fp16.safetensors")
    Path("r.yaml").write_text("sources: [{source: model, variant: fp16}]\noutput: out\n")
    assert run(["run", "r.yaml"]) == 0
    assert json.loads(Path("out", RECORD_FILE).read_text())["options"]["variant"] == "fp16"


@pytest.mark.parametrize("line", ["weights: both", "variant: [fp16]"])
def test_weights_that_cannot_be_meant_are_refused(here: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(f"sources: [{{source: model, {line}}}]\noutput: out\n")
    assert run(["run", "r.yaml"]) == 2
    assert line.split(":")[0] in capsys.readouterr().err
