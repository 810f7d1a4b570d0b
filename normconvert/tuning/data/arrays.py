"""Ready inputs: npz and safetensors files with one array for each argument of the model, and perhaps ``labels``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from normconvert.errors import InputError
from normconvert.tuning.data.batches import Columns
from normconvert.tuning.data.wanted import Wanted, check_columns


def read_arrays(name: str, kind: str, path: Path, wanted: Wanted) -> Columns:
    """The examples of a file; arrays are (examples, ...).

    Raises:
        InputError: the file cannot be read, or does not fit the model.
    """
    columns = _npz(name, path) if kind == "npz" else _safetensors(name, path)
    columns = {k: v.float() if v.is_floating_point() else v.long() for k, v in columns.items()}
    check_columns(name, columns, wanted)
    return Columns(name, columns, shifted=wanted.causal and columns.get("labels", torch.empty(0)).ndim == 2)


def _npz(name: str, path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            return {key: torch.from_numpy(np.ascontiguousarray(file[key])) for key in file.files}
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{name}: not a readable npz file of plain arrays: {error}") from error


def _safetensors(name: str, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name}: not a readable safetensors file: {error}") from error
    return found
