"""What an identification reads of a checkpoint: names, shapes, and what it states of itself. No values."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.files.pickle_file import read_pickle_entries
from normconvert.files.safetensors_file import FLOATING, read_header
from normconvert.files.tensor_info import TensorInfo
from normconvert.files.weight_files import (
    PICKLES,
    TIMM_FILES,
    WEIGHT_FILES,
    find_weights,
    inside,
    load_json,
    notes_on,
    read_checkpoint,
)
from normconvert.identification.result import Shape, Stated
from normconvert.plan.conversion_record import RECORD_FILE

KEYS = ("architecture", "arch", "model_name", "timm_model", "model", "model_type")
"""Metadata and entries that state an architecture, alone or in ``args``."""
GENERAL = frozenset(name.partition(".")[0] for name in WEIGHT_FILES + TIMM_FILES) | {"model", "checkpoint", "weights"}
"""What weight files are called whatever they hold: there the folder's name says more."""


@dataclass(frozen=True)
class Names:
    """The tensors of a checkpoint.

    Attributes:
        shapes: name -> shape.
        integers: names of those that hold no floating numbers.
        stated: what is said of the architecture.
        notes: which of several weights these are, and what their names are taken without.
    """

    shapes: dict[str, Shape]
    integers: frozenset[str]
    stated: tuple[Stated, ...] = ()
    notes: tuple[str, ...] = ()


def read_names(path: Path) -> Names:
    """Names and shapes in a weight file, or in the weight file or shards of a folder.

    Raises:
        InputError: there are no weights, or they are no checkpoint.
    """
    weights = path
    if path.is_dir():
        config = load_json(inside(path, "config.json")) if (path / "config.json").is_file() else {}
        library = "transformers" if "model_type" in config or "architectures" in config else "timm"
        weights = find_weights(path, config, library)
    checkpoint, folder = read_checkpoint(weights), path if path.is_dir() else None
    names = names_of(checkpoint.tensors, stated(weights, folder))
    return replace(names, notes=notes_on(checkpoint, weights, folder))


def names_of(tensors: dict[str, TensorInfo], said: tuple[Stated, ...]) -> Names:
    """The names of an opened checkpoint."""
    return Names(
        {name: info.shape for name, info in tensors.items()},
        frozenset(name for name, info in tensors.items() if info.dtype not in FLOATING),
        said,
    )


def stated(weights: Path, folder: Path | None) -> tuple[Stated, ...]:
    """What a checkpoint's metadata, entries, file name or folder say of its architecture, the clearest first."""
    said: list[Stated] = []
    for file in (RECORD_FILE, "config.json"):
        if folder is not None and (folder / file).is_file():
            said += [Stated(file, name) for name in _in_json(load_json(inside(folder, file)))]
    if weights.suffix == ".safetensors":
        said += [Stated(f"metadata {key}", value) for key, value in _keys(read_header(weights).metadata)]
    elif weights.name.endswith(PICKLES):
        # It only breaks ties: a file that states nothing is still identified.
        with suppress(InputError, OSError):
            said += [Stated(f"entry {key}", value) for key, value in _keys(read_pickle_entries(weights))]
    first = weights.name.partition(".")[0]
    if first not in GENERAL:
        said.append(Stated("file name", weights.stem))
    elif folder is not None:
        # Resolved: a link may have any name, and `.` has none.
        said.append(Stated("folder name", folder.resolve().name))
    return tuple(dict.fromkeys(Stated(s.where, architecture(s.name)) for s in said if s.name))


def _keys(found: dict[str, str]) -> list[tuple[str, str]]:
    return [(key, value) for key, value in found.items() if key.rpartition(".")[2] in KEYS]


def _in_json(data: dict[str, Any]) -> list[str]:
    found = [data.get("architecture"), data.get("model_type")]
    return [name for name in found if isinstance(name, str)]


def architecture(text: str) -> str:
    """The name in ``timm/resnet50.a1_in1k``, ``timm:resnet50`` or ``resnet50.pth``."""
    return text.replace("\\", "/").rpartition("/")[2].rpartition(":")[2].partition(".")[0]
