"""A square matrix from a file that somebody gives: safetensors, NumPy's or torch's, each read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.errors import InputError, first_line
from normconvert.files.digest import sha256
from normconvert.files.pickle_file import read_plain_tensors
from normconvert.files.safetensors_file import map_tensor, read_header

if TYPE_CHECKING:
    from torch import Tensor

KINDS = (".safetensors", ".npy", ".pt", ".pth", ".bin")
"""Endings of the files that are read."""
SHOWN = 3
"""Names of tensors that a refusal lists."""


def read_matrix(path: Path) -> tuple[Tensor, str]:
    """The only tensor of a file, in float64, and the sha256 of the file.

    Raises:
        InputError: there is no such file, it holds no tensor or several, or one that is no square matrix of finite
            floating numbers.
    """
    import torch

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}: expected a file with one square matrix ({', '.join(KINDS)})")
    if path.suffix not in KINDS:
        raise InputError(f"{path}: no tensor file: expected {', '.join(KINDS)}")
    tensors = _tensors(path)
    if len(tensors) != 1:
        names = ", ".join(list(tensors)[:SHOWN]) + (", …" if len(tensors) > SHOWN else "")
        found = f"{len(tensors)} tensors ({names})" if tensors else "no tensor"
        raise InputError(f"{path}: holds {found}; expected one square matrix")
    (matrix,) = tensors.values()
    shape = list(matrix.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0] or not matrix.is_floating_point():
        kind = str(matrix.dtype).removeprefix("torch.")
        raise InputError(f"{path}: holds {kind} of the shape {shape}; expected one square matrix of floating numbers")
    matrix = matrix.to(torch.float64, copy=True)
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        raise InputError(
            f"{path}: {bad} of {matrix.numel()} numbers are not finite; expected one square matrix of numbers"
        )
    return matrix, sha256(path)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return {name: map_tensor(info) for name, info in read_header(path).tensors.items()}
    if path.suffix == ".npy":
        return {"array": _array(path)}
    return read_plain_tensors(path)


def _array(path: Path) -> Tensor:
    import numpy as np
    import torch

    try:
        # Mapped, so that a header which claims more than the file holds takes no memory.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("several arrays")
        return torch.from_numpy(np.array(array))
    except (OSError, EOFError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: not a readable file of one NumPy array: {first_line(error)}") from error
