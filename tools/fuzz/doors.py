"""The ways in: each takes files that somebody else wrote, and a strategy says how they may be broken."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import normconvert
from normconvert.files.weight_files import read_checkpoint
from normconvert.files.yaml_file import read_yaml
from normconvert.recipes.batch import plan_recipes
from normconvert.recipes.job import Job
from normconvert.recipes.state import State
from normconvert.sources import open_source
from normconvert.verification.limits import read_limits
from tools.fuzz.mutations import BOMB, mutated_bytes, mutated_json

RECIPE = """\
description: &d fuzz
defaults: {method: rmsnorm, verify: false, options: {tied: untie, min_gain: 3}, limits: {}}
sources:
- source: demo:gpt2
  name: first
- {folder: "no/*", exclude: ["x*"]}
- demo:vit
matrix: [rmsnorm, {method: crmsnorm, name: small, max_shard_size: 5GB}]
output: out/{name}-{variant}
"""


@dataclass(frozen=True)
class Door:
    """A way in.

    Attributes:
        name: for the table.
        share: of all inputs.
        inputs: draws the bytes of the file.
        file: what they are written to, in a folder where everything else is right.
        enter: called with that folder; raises only what users are told.
    """

    name: str
    share: int
    inputs: st.SearchStrategy[bytes]
    file: str
    enter: Callable[[Path], object]


class _Payload:
    """Would leave a trace if anything of a pickle ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def prepare(root: Path) -> None:
    """Make the right inputs: a checkpoint, its conversion, shards, pickles, a recipe."""
    shutil.copytree(Path(normconvert.__file__).parent / "demos" / "gpt2", root / "source")
    normconvert.convert(root / "source", root / "converted", verify=False)
    weights = (root / "source" / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    names = [name for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
    (root / "sharded").mkdir()
    (root / "sharded" / "model-00001-of-00001.safetensors").write_bytes(weights)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "small").mkdir()


def doors(root: Path) -> list[Door]:
    """All of them, for inputs that :func:`prepare` made."""
    weights = (root / "source" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8:length]), weights[length:]
    config, index, record, converted = (
        json.loads((root / name).read_text())
        for name in (
            "source/config.json", "sharded/model.safetensors.index.json", "converted/normconvert.json",
            "converted/config.json",
        )
    )  # fmt: skip

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + data

    recipe = RECIPE.encode()
    job = Job("demo:gpt2", "a", "b", str(root / "out"), "r:1", "rmsnorm", {})
    state = {"settings": job.settings, "source": "a", "revision": None, "source_files": None, "format": 1}
    return [
        Door("header", 18, mutated_json(header).map(with_header), "small/w.safetensors", _weights),
        Door("header bytes", 10, mutated_bytes(weights, length), "small/w.safetensors", _weights),
        Door("index", 10, mutated_json(index), "sharded/model.safetensors.index.json", _index),
        Door("config", 8, mutated_json(config), "source/config.json", lambda r: open_source(str(r / "source"))),
        Door("config bytes", 5, mutated_bytes(json.dumps(config).encode()), "source/config.json", _identify),
        Door("pickle", 20, st.sampled_from(_pickles(root)).flatmap(mutated_bytes), "small/w.bin", _pickle),
        Door("record", 12, mutated_json(record), "converted/normconvert.json", _load),
        Door("converted config", 4, mutated_json(converted), "converted/config.json", _load),
        Door("recipe", 15, mutated_bytes(recipe), "r.yaml", lambda r: plan_recipes(r / "r.yaml")),
        Door("yaml", 12, mutated_bytes(BOMB) | st.sampled_from([BOMB, recipe]), "r.yaml", _yaml),
        Door("state", 4, mutated_json(state), "state.json", lambda r: State.parse((r / "state.json").read_bytes())),
    ]


def _weights(root: Path) -> None:
    read_checkpoint(root / "small" / "w.safetensors")


def _index(root: Path) -> None:
    read_checkpoint(root / "sharded" / "model.safetensors.index.json")


def _pickle(root: Path) -> None:
    read_checkpoint(root / "small" / "w.bin")


def _identify(root: Path) -> None:
    normconvert.identify(root / "source")


def _load(root: Path) -> None:
    normconvert.load(root / "converted")


def _yaml(root: Path) -> None:
    read_yaml(root / "r.yaml")
    read_limits(root / "r.yaml")


def _pickles(root: Path) -> list[bytes]:
    """Checkpoints of torch's two formats, one that would run code, and one that unpacks to a gigabyte."""
    state = {"a.weight": torch.zeros(2, 3), "b": torch.arange(3)}
    found = []
    for content in (state, {"state_dict": state, "args": {"model": "x"}}, {**state, "c": _Payload(root / "ran")}):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=new)
            found.append(buffer.getvalue())
    found.append(pickle.dumps(_Payload(root / "ran")))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"N" * 50_000_000 + b".")
    return [*found, bomb.getvalue()]
