"""From ``KIND:WHERE`` to examples that fit the model."""

from __future__ import annotations

from torch import nn

from normconvert.errors import InputError
from normconvert.files.user_paths import user_path
from normconvert.tuning.data.arrays import read_arrays
from normconvert.tuning.data.batches import Data
from normconvert.tuning.data.demo import demo_data
from normconvert.tuning.data.images import read_images
from normconvert.tuning.data.tables import read_hub, read_parquet
from normconvert.tuning.data.text import read_text
from normconvert.tuning.data.wanted import Wanted

KINDS = {
    "imagefolder": "imagefolder:FOLDER, a subfolder for each class",
    "text": "text:FILE, or a folder of *.txt",
    "parquet": "parquet:FILE[:COLUMN]",
    "hf": "hf:NAME[:SPLIT][:COLUMN], a data set of the hub",
    "npz": "npz:FILE, an array for each of the model's arguments, and labels",
    "safetensors": "safetensors:FILE, likewise",
    "demo": "demo:, the embedded models' own",
}
"""Kind -> what it is, in words."""


def open_data(
    name: str, wanted: Wanted, teacher: nn.Module, *, length: int | None = None, held_out: bool = False
) -> Data:
    """The examples that ``name`` means.

    Args:
        name: ``KIND:WHERE``, a row of :data:`KINDS`.
        wanted: what the model takes.
        teacher: makes text, for ``demo:``.
        length: tokens an example of text.
        held_out: of ``demo:``, the part to be measured on.

    Raises:
        InputError: it cannot be read, is empty, or does not fit the model.
    """
    kind, colon, where = name.partition(":")
    if not colon or kind not in KINDS:
        raise InputError(f"unknown data {name!r}; expected {'; '.join(KINDS.values())}")
    if kind == "demo":
        return demo_data(kind, wanted, teacher, length, held_out=held_out)
    if not where:
        raise InputError(f"{name}: where? expected {KINDS[kind]}")
    if kind == "hf":
        return read_hub(name, where, wanted, length)
    column = None
    path = user_path(where)
    if kind == "parquet" and not path.exists() and ":" in where:
        where, _, column = where.rpartition(":")
        path = user_path(where)
    if not path.exists():
        raise InputError(f"{name}: no such file or folder")
    if kind == "imagefolder":
        return read_images(name, path, wanted)
    if kind == "text":
        return read_text(name, path, wanted, length)
    if kind == "parquet":
        return read_parquet(name, path, column, wanted, length)
    return read_arrays(name, kind, path, wanted)
