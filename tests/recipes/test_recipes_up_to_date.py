"""What a batch finds already there: skipped, made again, refused, never taken for done when it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import normconvert
from normconvert.errors import InputError
from normconvert.recipes import claim, fingerprint, state, work
from tests.support.recipe_jobs import job_of, look, perform
from tests.support.tiny_checkpoints import contents


def test_what_is_done_is_skipped_until_something_about_it_changes(here: Path) -> None:
    job = job_of()
    first = perform(job)
    assert (first.status, first.norms) == ("converted", (3, 3))
    before = look(Path("out"))
    assert state.decide(job).action == "skip"
    assert perform(job).status == "skipped"
    assert look(Path("out")) == before

    def reason(text: str) -> str:
        decision = state.decide(job_of(text))
        return f"{decision.action}: {decision.why}"

    said = "sources: [{source: model, %s}]\noutput: out/model-rmsnorm\n"
    assert reason(said % "options: {min_gain: 2}") == "redo: min_gain was not set, is 2"
    assert reason(said % "dtype: bfloat16") == "redo: dtype was auto, is bfloat16"
    assert reason(said % "method: fuse-bn") == "redo: method was rmsnorm, is fuse-bn"
    assert reason(said % "limits: {rounding: 1.99, top1: 0.5}") == "skip: up to date"
    assert reason(said % "limits: {rounding: 0.1}").startswith("redo: rounding is ")
    assert reason(said % "verify: false") == "skip: up to date"  # it is more than what is asked for
    decision = state.decide(replace(job, redo=True))
    assert (decision.action, decision.why) == ("redo", "forced")


@pytest.mark.slow
def test_a_second_attempt_in_one_batch_does_not_write_again_even_when_forced(here: Path) -> None:
    job = job_of(redo=True)
    assert perform(job, "batch").status == "converted"
    before = look(Path("out"))
    again = perform(job, "batch")  # the worker died between writing and saying so
    assert (again.status, again.norms) == ("converted", (3, 3))
    assert again.figures["top1"] == 1.0
    assert look(Path("out")) == before
    assert perform(job, "another").status == "converted"
    assert look(Path("out")) != before


def test_a_source_that_changed_in_content_is_converted_again_one_that_was_touched_is_not(here: Path) -> None:
    job = job_of()
    perform(job)
    weights = Path("model/model.safetensors")
    os.utime(weights)
    assert state.decide(job).action == "skip"
    shutil.copytree("model", "copy")
    shutil.rmtree("model")
    Path("copy").rename("model")
    assert state.decide(job).action == "skip"  # other inodes and times, the same bytes
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    times = weights.stat()
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some tools do
    decision = state.decide(job)
    assert (decision.action, decision.why) == ("redo", "of the source, model.safetensors changed")
    assert perform(job).status == "converted"
    assert state.decide(job).action == "skip"
    Path("model/pytorch_model.bin").write_bytes(b"")
    assert state.decide(job).why == "of the source, pytorch_model.bin is new"


def test_an_output_of_another_version_is_made_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    perform(job)
    monkeypatch.setattr(state, "__version__", "99.0")
    decision = state.decide(job)
    assert decision.action == "redo"
    assert decision.why == f"made by normconvert {normconvert.__version__}, this is 99.0"


def test_an_output_that_was_not_verified_is_made_again_when_it_is_to_be(here: Path) -> None:
    perform(job_of("sources: [{source: model, verify: false}]\n"))
    decision = state.decide(job_of())
    assert (decision.action, decision.why) == ("redo", "it was not verified")


def test_what_somebody_edited_is_not_replaced_unless_forced(here: Path) -> None:
    job = job_of()
    perform(job)
    out = Path("out/model-rmsnorm")
    (out / "README.md").write_text("my own words")
    assert state.decide(job).action == "skip"  # a model card is there to be edited
    other = job_of("sources: [{source: model, options: {min_gain: 2}}]\n")
    assert state.decide(other).action == "refuse"
    assert perform(other).exit_status == 2
    assert (out / "README.md").read_text() == "my own words"
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    decision = state.decide(job)
    assert decision.action == "refuse"
    assert "model.safetensors changed" in decision.why
    (out / "notes.txt").write_text("mine")
    assert perform(replace(job, redo=True)).status == "converted"
    assert state.decide(job).action == "skip"
    assert not (out / "notes.txt").exists()


@pytest.mark.slow
def test_a_file_that_was_lost_is_made_again(here: Path) -> None:
    job = job_of()
    perform(job)
    Path("out/model-rmsnorm/model.safetensors").unlink()
    decision = state.decide(job)
    assert (decision.action, decision.why) == ("redo", "model.safetensors is missing")
    assert perform(job).status == "converted"


def test_foreign_folders_are_never_replaced(here: Path) -> None:
    out = Path("out/model-rmsnorm")
    out.mkdir(parents=True)
    assert state.decide(job_of()).action == "convert"  # an empty one is nobody's
    (out / "thesis.tex").write_text("mine")
    for redo in (False, True):
        result = perform(replace(job_of(), redo=redo))
        assert result.exit_status == 2
        assert "was not made by normconvert" in result.message
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    shutil.rmtree(out)
    normconvert.convert("model", out, verify=False)
    assert "was not made by a recipe: --force" in state.decide(job_of()).why
    assert perform(replace(job_of(), redo=True)).status == "converted"


def test_a_failed_conversion_leaves_the_old_output_as_it_was(here: Path) -> None:
    perform(job_of())
    before = contents(Path("out"))
    result = perform(job_of("sources: [{source: model, limits: {rounding: 0}}]\n"))
    assert result.exit_status == 1
    assert contents(Path("out")) == before


def test_a_source_that_changes_while_it_is_read_is_not_taken_for_done(here: Path) -> None:
    job = job_of()

    def meddle(kind: str, data: dict[str, Any]) -> None:
        if data.get("name") == "verify":
            Path("model/config.json").write_text(Path("model/config.json").read_text() + "\n")

    result = work.perform(job, meddle)
    assert result.exit_status == 2
    assert "changed while it was converted" in result.message
    assert list(Path("out").iterdir()) == []


def test_no_path_of_this_machine_is_written_into_an_output(here: Path) -> None:
    perform(job_of())
    for name, data in contents(Path("out")).items():
        assert str(here).encode() not in data, name


def test_a_second_conversion_passes_over_the_state_of_the_first(here: Path) -> None:
    perform(job_of())
    from normconvert.apply.other_files import copy_other_files

    Path("copy").mkdir()
    copied = copy_other_files(Path("out/model-rmsnorm"), Path("copy")).files
    assert not any(".cache" in name for name in copied)


# Fingerprints


@pytest.mark.parametrize("times", ["new", "kept"])
def test_a_changed_byte_is_seen_whatever_the_times_say(tmp_path: Path, times: str) -> None:
    (tmp_path / "a").write_bytes(b"one")
    mark = fingerprint.take(tmp_path)
    mark = replace(mark, seen=mark.seen + 10 * fingerprint.TICK)  # as if it had been there for long
    before = (tmp_path / "a").stat()
    time.sleep(0.05)  # the clock of the file system ticks
    (tmp_path / "a").write_bytes(b"two")
    if times == "kept":
        os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint.compare(mark, tmp_path).changed == ("a",)


def test_a_file_that_may_have_changed_in_the_moment_it_was_recorded_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    mark = fingerprint.take(tmp_path)
    forged = {"a": replace(mark.files["a"], sha256="0" * 64)}  # what only reading can tell
    assert fingerprint.compare(replace(mark, files=forged), tmp_path).changed == ("a",)
    long_ago = replace(mark, seen=mark.seen + 10 * fingerprint.TICK, files=forged)
    assert fingerprint.compare(long_ago, tmp_path).same


# Claims


def test_two_processes_never_make_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from normconvert.recipes.claim import claim\n"
        "with claim(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match="another process is making it"), claim.claim(out, patience=0.3):
            pass
        process.kill()
        with claim.claim(out) as folder:  # the claim of a process that was killed ends with it
            assert list(folder.iterdir()) == []
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []


def test_an_old_output_comes_back_if_the_new_one_never_came(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (claim.staging(out) / claim.NEW).mkdir(parents=True)
    (tmp_path / ".out.old-1").mkdir()
    (tmp_path / ".out.old-1" / "file").write_text("old")
    claim.discard(out)
    assert (out / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
