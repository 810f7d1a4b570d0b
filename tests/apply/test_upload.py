"""``--push-to-hub``: a private repository, and a card whose examples load it; through a real server on the loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normconvert
from normconvert.errors import InputError
from tests.support.hub_server import Hub, Repository, serve
from tests.support.tiny_checkpoints import gpt2, save


def python(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that takes the server for the hub; settings are read once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": "secret", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_finished_output_is_uploaded_privately_and_its_card_loads_it(tmp_path: Path) -> None:
    source = save(gpt2(n_layer=1, n_embd=24), tmp_path / "model")
    repositories: dict[str, Repository] = {}
    with serve(repositories) as hub:
        arguments = ["-m", "normconvert", "rmsnorm", str(source), "out", "--no-verify", "--push-to-hub", "me/tiny"]
        done = python(hub, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert "https://huggingface.co/me/tiny" in done.stdout
        out = tmp_path / "out"
        assert hub.uploads["me/tiny"] == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
        assert hub.made["me/tiny"]["visibility"] == "private"
        card = (out / "README.md").read_text()
        blocks = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
        assert all('"me/tiny"' in block for block in blocks)
        repositories["me/tiny"] = Repository(out)
        for block in blocks[:2]:  # normconvert's, and transformers' with the shipped file
            loaded = python(hub, tmp_path, "-c", f"{block}\nprint([type(m).__name__ for m in model.modules()])")
            assert "RMSNorm" in loaded.stdout, loaded.stderr
        assert json.loads((out / "normconvert.json").read_text())["options"]["name"] == "me/tiny"


@pytest.mark.parametrize(
    ("repo", "message"),
    [("a/b/c", "not a hub id"), ("../x", "not a hub id"), ("org/model", "that is the source itself")],
)
def test_a_repository_that_cannot_be_is_refused_before_any_work(repo: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        normconvert.convert("org/model@v1", tmp_path / "out", push_to_hub=repo)


def test_public_says_nothing_without_a_repository(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--public says how --push-to-hub REPO uploads"):
        normconvert.convert("demo:gpt2", tmp_path / "out", public=True)
