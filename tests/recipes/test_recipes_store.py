"""Outputs in an object store, through the real s3fs and a real server on the loopback."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from normconvert.errors import InputError
from normconvert.plan.conversion_record import RECORD_FILE
from normconvert.recipes import state, work
from normconvert.recipes.expansion import expand
from normconvert.recipes.job import Job, Result
from normconvert.recipes.reading import read_recipe
from normconvert.recipes.storage import Store
from tests.support import s3_server
from tests.support.tiny_checkpoints import gpt2, save

pytest.importorskip("s3fs")
OUT = "bucket/out/model-rmsnorm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt2(n_layer=1, n_embd=24), tmp_path_factory.mktemp("store") / "model")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, model: Path) -> Iterator[s3_server.Store]:
    from s3fs import S3FileSystem

    settings = {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "DEFAULT_REGION": "us-east-1",
        "EC2_METADATA_DISABLED": "1",
    }
    with s3_server.serve() as server:
        for name, value in (settings | {"ENDPOINT_URL": server.url, "MAX_ATTEMPTS": "1"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.chdir(model.parent)
        yield server
    S3FileSystem.clear_instance_cache()


def job_of(settings: str = "") -> Job:
    Path("r.yaml").write_text(f"sources: [model]\noutput: s3://bucket/out/{{name}}-rmsnorm\n{settings}")
    (job,) = expand([read_recipe("r.yaml")])
    return job


def perform(job: Job) -> Result:
    return work.perform(replace(job, run=uuid.uuid4().hex), lambda kind, data: None)


def test_an_output_in_an_object_store_is_that_of_a_folder_and_complete_when_its_last_file_is_there(
    store: s3_server.Store, tmp_path: Path
) -> None:
    job = job_of()
    assert state.decide(job).action == "convert"
    result = perform(job)
    assert result.status == "converted", result.message
    # By the same name, since the card's lines have it.
    folder = tmp_path / Path(OUT).name
    local = replace(job, output=str(folder))
    assert perform(local).status == "converted"
    there = {name.removeprefix(f"{OUT}/"): data for name, data in store.objects.items()}
    here = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert there.keys() == here.keys()
    assert {n: d for n, d in there.items() if n != state.STATE} == {n: d for n, d in here.items() if n != state.STATE}
    written = [request.removeprefix(f"PUT {OUT}/") for request in store.requests if request.startswith(f"PUT {OUT}/")]
    assert (written[0], written[-1]) == (RECORD_FILE, state.STATE)

    # Known again; never replaced if somebody edited it; made again if it is out of date or not complete.
    assert state.decide(job).action == "skip"
    assert perform(job).status == "skipped"
    assert state.decide(job_of("defaults: {options: {min_gain: 2}}\n")).why == "min_gain was not set, is 2"
    weights = store.objects.pop(f"{OUT}/model.safetensors")
    assert state.decide(job).why == "model.safetensors is missing"
    store.objects[f"{OUT}/model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    assert state.decide(job).action == "refuse"
    kept = store.objects.pop(f"{OUT}/{state.STATE}")
    assert state.decide(job).why == "it is not complete"
    store.objects[f"{OUT}/{state.STATE}"] = kept
    store.objects[f"{OUT}/stale.txt"] = b"from an older version"
    store.requests.clear()
    assert perform(replace(job, redo=True)).status == "converted"
    changes = [request for request in store.requests if request.split()[0] in ("PUT", "DELETE", "POST")]
    assert state.STATE in changes[0] or changes[0].startswith("POST")  # it stops being complete before anything changes
    assert f"{OUT}/stale.txt" not in store.objects
    assert state.decide(job).action == "skip"


def test_what_normconvert_did_not_put_there_is_left_alone(store: s3_server.Store) -> None:
    store.objects[f"{OUT}/thesis.tex"] = b"mine"
    for redo in (False, True):
        result = perform(replace(job_of(), redo=redo))
        assert result.exit_status == 2
        assert "was not made by normconvert" in result.message
    assert store.objects == {f"{OUT}/thesis.tex": b"mine"}


def test_a_store_that_cannot_be_reached_or_is_of_an_unknown_kind_is_one_line(
    store: s3_server.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="nonsense://b/x: Protocol not known"):
        Store("nonsense://b/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="s3://bucket/out/model-rmsnorm: cannot be listed: "):
        state.decide(job_of())
