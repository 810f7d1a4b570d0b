"""The hub, through the real huggingface_hub and a real server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import Hub, Repository, serve
from tests.support.tiny_checkpoints import gpt2, save

# huggingface_hub reads its settings when it is imported, so each setting needs a process of its own.
CLIENT = """
import json, sys
from normconvert.errors import InputError
from normconvert.sources import open_source
for reference in sys.argv[1:]:
    try:
        s = open_source(reference)
        names = sorted(p.name for p in s.folder.iterdir())
        print(json.dumps([reference, s.architecture, s.revision, len(s.name_map), names]))
    except InputError as error:
        print(json.dumps([reference, "error", str(error)]))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repository]:
    root = tmp_path_factory.mktemp("hub")
    model = gpt2()
    sharded = save(model, root / "sharded", "sharded")
    (sharded / "pytorch_model.bin").write_bytes(b"not wanted")
    (sharded / "tf_model.h5").write_bytes(b"not wanted")
    (sharded / "LICENSE").write_text("free")
    return {
        "org/sharded": Repository(sharded, {"v1": "a" * 40}),
        "plain": Repository(save(model, root / "bin", "bin")),
        "org/gated": Repository(sharded, gated=True),
        "org/private": Repository(sharded, token="secret"),
    }


@pytest.fixture(scope="module")
def hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    with serve(repositories) as running:
        yield running


def ask(endpoint: str, home: Path, *references: str, **settings: str) -> dict[str, list[object]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") or k.startswith("HF_HUB_DISABLE")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **settings}
    done = subprocess.run([sys.executable, "-c", CLIENT, *references], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}


def test_models_are_found_cached_and_found_again_offline(
    hub: Hub, repositories: dict[str, Repository], tmp_path: Path
) -> None:
    names = ("org/sharded", "org/sharded@v1", "plain")
    online = ask(hub.url, tmp_path, *names, "org/none", "org/sharded@nope", "org/gated", "org/private")
    assert online["org/sharded"][:3] == ["GPT2LMHeadModel", repositories["org/sharded"].revisions["main"], 28]
    assert online["org/sharded@v1"][1] == "a" * 40
    files = online["org/sharded"][3]
    assert isinstance(files, list)
    assert "LICENSE" in files
    assert not {"tf_model.h5", "pytorch_model.bin"} & set(files)
    assert "pytorch_model.bin" in str(online["plain"][3])  # no safetensors there
    expected = {
        "org/none": "no such model",
        "org/sharded@nope": "revision 'nope'",
        "org/gated": "gated",
        "org/private": "HF_TOKEN",
    }
    for reference, words in expected.items():
        kind, message = online[reference]
        assert kind == "error"
        assert words in str(message)
        assert "\n" not in str(message)
    asked = len(hub.requests)
    offline = ask(hub.url, tmp_path, *names, "org/other", HF_HUB_OFFLINE="1")
    assert {name: offline[name] for name in names} == {name: online[name] for name in names}
    assert "offline" in str(offline["org/other"][1])
    assert len(hub.requests) == asked


def test_token_opens_a_private_model(hub: Hub, tmp_path: Path) -> None:
    assert ask(hub.url, tmp_path, "org/private", HF_TOKEN="secret")["org/private"][0] == "GPT2LMHeadModel"


def test_no_network_is_one_line(tmp_path: Path) -> None:
    kind, message = ask("http://127.0.0.1:9", tmp_path, "org/sharded")["org/sharded"]
    assert kind == "error"
    assert "cannot be reached" in str(message)
