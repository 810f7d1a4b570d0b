"""Recipes and the hub, through the real huggingface_hub and a real server on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_server import Hub, Repository, serve
from tests.support.tiny_checkpoints import gpt2, save

MODELS = ("tiny-1m", "tiny-2m", "tiny-2m-deduped", "other")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt2(n_layer=1, n_embd=24), tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def repositories(model: Path, tmp_path: Path) -> dict[str, Repository]:
    for name in MODELS:
        shutil.copytree(model, tmp_path / "hub" / name)
    found = {f"org/{name}": Repository(tmp_path / "hub" / name) for name in MODELS}
    return found | {"org/gated": Repository(tmp_path / "hub" / "other", gated=True)}


@pytest.fixture
def hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    with serve(repositories) as running:
        yield running


def normconvert(hub: str, folder: Path, *arguments: str, **settings: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, JSON document, stderr) of ``normconvert run``, in a process since settings are read once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") or k.startswith("HF_HUB_DISABLE")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", **settings}
    done = subprocess.run(
        [sys.executable, "-m", "normconvert", "run", *arguments, "--json", "-"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


RECIPE = """
sources:
  - author: org
    models: tiny-*
    exclude: "*-deduped"
defaults:
  upload: {repo: "me/{name}-{variant}", enabled: %s}
output: out/{author}-{name}
"""


@pytest.mark.slow
def test_an_authors_models_are_converted_at_their_commit_and_uploaded_if_the_recipe_says_so(
    hub: Hub, repositories: dict[str, Repository], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE % "false")
    status, plan, _ = normconvert(hub.url, tmp_path, "r.yaml", "--dry-run")
    assert status == 0
    assert [(job["source"], job["action"]) for job in plan["jobs"]] == [
        ("org/tiny-1m", "convert"), ("org/tiny-2m", "convert"),
    ]  # fmt: skip
    size = (tmp_path / "hub/tiny-1m/model.safetensors").stat().st_size
    assert [job["size"] for job in plan["jobs"]] == [size, size]
    assert not any("resolve" in request for request in hub.requests)  # nothing was downloaded for that
    status, report, err = normconvert(hub.url, tmp_path, "r.yaml")
    assert status == 0, err
    assert report["counts"]["converted"] == 2
    assert hub.uploads == {}
    commits = [repositories[job["source"]].revisions["main"] for job in report["jobs"]]
    assert [job["revision"] for job in report["jobs"]] == commits
    record = json.loads((tmp_path / "out/org-tiny-1m/normconvert.json").read_text())
    assert record["source"]["revision"] == commits[0]

    # Nothing to do, but for what is not on the hub yet.
    assert normconvert(hub.url, tmp_path, "r.yaml")[1]["counts"]["skipped"] == 2
    recipe.write_text(RECIPE % "true")
    assert [j["action"] for j in normconvert(hub.url, tmp_path, "r.yaml", "--dry-run")[1]["jobs"]] == ["upload"] * 2
    status, report, err = normconvert(hub.url, tmp_path, "r.yaml", HF_TOKEN="secret")
    assert status == 0, err
    assert [job["result"]["uploaded"] for job in report["jobs"]] == ["me/tiny-1m-rmsnorm", "me/tiny-2m-rmsnorm"]
    files = {p.name: p.read_bytes() for p in (tmp_path / "out/org-tiny-1m").iterdir() if p.is_file()}
    assert hub.uploads["me/tiny-1m-rmsnorm"] == files
    assert hub.made["me/tiny-1m-rmsnorm"]["visibility"] == "private"
    hub.uploads.clear()
    assert normconvert(hub.url, tmp_path, "r.yaml", HF_TOKEN="secret")[1]["counts"]["skipped"] == 2
    assert hub.uploads == {}

    # A new commit is another source; without a network the cache's commit is taken.
    repositories["org/tiny-1m"].revisions["main"] = "d" * 40
    plan = normconvert(hub.url, tmp_path, "r.yaml", "--dry-run")[1]
    assert [job["why"] for job in plan["jobs"]] == ["the source is at commit dddddddd now", "up to date"]
    (tmp_path / "offline.yaml").write_text("sources: [org/tiny-1m, org/tiny-2m]\noutput: out/{author}-{name}\n")
    status, plan, err = normconvert(hub.url, tmp_path, "offline.yaml", "--dry-run", HF_HUB_OFFLINE="1")
    assert status == 0, err
    assert [job["why"] for job in plan["jobs"]] == ["up to date"] * 2, err


def test_models_that_cannot_be_had_are_told_all_at_once(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "sources:\n  - org/tiny-1m\n  - org/nothing\n  - org/tiny-2m@nope\n  - org/gated\n"
        "  - {author: nobody}\n  - {author: org, models: big-*}\n"
    )
    status, document, err = normconvert(hub.url, tmp_path, "r.yaml")
    assert status == 2
    first, *lines = [line for line in err.splitlines() if not line.endswith("...")]
    assert first == "error: 5 sources cannot be had; nothing was run:"
    expected = {
        "r.yaml:6:5": "the models of nobody: the hub knows none",
        "r.yaml:7:5": "the models of org: none of 5 matches big-*",
        "r.yaml:3:5": "org/nothing: no such folder, and no such model on the hub",
        "r.yaml:4:5": "has no revision 'nope'",
        "r.yaml:5:5": "org/gated: a gated model",
    }
    for line, (place, words) in zip(lines, expected.items(), strict=True):
        assert line.strip().startswith(place)
        assert words in line
    assert document["exit_status"] == 2
    assert not (tmp_path / "out").exists()
