"""Every other file of the source: copied as it is, unless it is weights, code, or a link to somewhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.files.code_references import without_code
from normconvert.files.weight_files import ADAPTER_FILES, PICKLES, leads_inside, load_json, read_text

# Weights in any format: the converted ones replace them, the others would be stale.
WEIGHT_PATTERNS = (
    "*.safetensors", *(f"*{suffix}" for suffix in PICKLES), "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite",
    "*.ot", "*.gguf", "*.npz", "*.mlmodel", "*.safetensors.index*.json", "*.bin.index*.json",
)  # fmt: skip
SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__", ".ipynb_checkpoints"})
TRAINING = re.compile(r"checkpoint-\d+")
"""What transformers' trainer calls the states that it goes on from."""
CODE_PATTERNS = ("*.py", "custom_generate/*")
"""What transformers runs of a checkpoint that is trusted."""


@dataclass
class Copied:
    """What became of the other files of a source, by relative name.

    Attributes:
        files: copied.
        links: left out, because they lead out of the folder, or to another folder in it.
        code: left out, because the code of a checkpoint is not to run in the name of its conversion.
        training: folders left out, because they hold checkpoints of the training.
        weights: left out, because they are others than those that are converted, in other folders.
    """

    files: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """For the user."""
        found = [f"{name} is a link and was not copied" for name in self.links]
        if self.code:
            found.append(
                f"code that came with the source was left out ({_few(self.code)}): "
                "take it from the source, and read it, if you need it"
            )
        if self.training:
            found.append(f"checkpoints of the training were left out: {_few(self.training)}")
        if self.weights:
            found.append(f"weights in other folders were left out: {_few(self.weights)}")
        return found


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def copy_other_files(folder: Path, out: Path, *, with_code: bool = False) -> Copied:
    """Copy every file that is not weights: contents only, no times or permissions.

    Args:
        folder: the checkpoint's.
        out: where to.
        with_code: the model itself is code of the checkpoint: without it the output could not be loaded.
    """
    copied = Copied()
    for path in _files(folder, copied):
        relative = path.relative_to(folder).as_posix()
        if not with_code and any(fnmatch(relative, pattern) for pattern in CODE_PATTERNS):
            copied.code.append(relative)
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        stripped = None if with_code else _stripped(path)
        if stripped is None:
            shutil.copyfile(path, out / relative)
        else:
            (out / relative).write_text(json.dumps(stripped, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            copied.code.append(f"auto_map of {relative}")
        copied.files.append(relative)
    return copied


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files by their relative names, in place of those that are there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def list_files(folder: Path) -> dict[str, Path]:
    """Every file or link below a folder by relative name, but for what version control and caches keep there."""
    found = {}
    for root, folders, names in os.walk(folder):
        # In place: os.walk goes down into what is left of the list.
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        found.update({(Path(root) / name).relative_to(folder).as_posix(): Path(root) / name for name in sorted(names)})
    return found


def module_folders(folder: Path) -> tuple[str, ...]:
    """The sub-folders of modules that stand behind the model, as sentence-transformers lists them in modules.json.

    Their weights are no part of what is converted.
    """
    try:
        listed = json.loads(read_text(folder / "modules.json"))
    except (InputError, ValueError, RecursionError):  # none, or not theirs
        return ()
    paths = [row.get("path") for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    return tuple(path.strip("/") for path in paths if isinstance(path, str) and path.strip("./"))


def _files(folder: Path, copied: Copied) -> Iterator[Path]:
    modules = module_folders(folder)
    for root, folders, names in os.walk(folder):
        # In place: os.walk goes down into what is left of the list, but not into links.
        training = [f for f in folders if TRAINING.fullmatch(f)]
        copied.training += [f"{(Path(root) / f).relative_to(folder).as_posix()}/" for f in sorted(training)]
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and f not in training)
        copied.links += [
            (Path(root) / name).relative_to(folder).as_posix() for name in folders if (Path(root) / name).is_symlink()
        ]
        here = f"{Path(root).relative_to(folder).as_posix()}/"
        of_module = any(here.startswith(f"{module}/") for module in modules)
        for name in sorted(names):
            path = Path(root) / name
            weights = any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS) and not of_module
            if weights and here != "./":
                copied.weights.append(f"{here}{name}")
            # A model beside which an adapter's configuration lies is taken for that adapter.
            if weights or (here == "./" and name in ADAPTER_FILES) or not path.is_file():
                continue
            # Somebody else's checkpoint could have any file of this machine copied into what is published then.
            if leads_inside(folder, path):
                yield path
            else:
                copied.links.append(path.relative_to(folder).as_posix())


def _stripped(path: Path) -> dict[str, Any] | None:
    """The data of a file that names code of the checkpoint, without that; None if it names none."""
    if not path.name.endswith("config.json"):
        return None
    try:
        data = load_json(path)
        kept: dict[str, Any] = without_code(data)
    except (InputError, RecursionError):  # what cannot be read here cannot be read by transformers either
        return None
    return None if kept == data else kept
