"""A rotation from a file: read without running code, known by its content, refused in a line where it is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from normconvert.errors import InputError
from normconvert.plan.given_rotations import read_rotation
from normconvert.plan.rotations import rotated

D = 12


def matrix(seed: int = 0, *, constant: bool = False) -> Tensor:
    return rotated(torch.eye(D, dtype=torch.float64), 0, "random", seed, constant)


SAVED: dict[str, Callable[[Tensor, Path], object]] = {
    ".safetensors": lambda q, path: save_file({"q": q.contiguous()}, path),
    ".npy": lambda q, path: np.save(path, q.numpy()),
    ".pt": torch.save,
    ".bin": lambda q, path: torch.save({"R1": q}, path),
}


@pytest.mark.parametrize("ending", SAVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("constant", [False, True])
def test_what_is_used_is_orthogonal_to_the_last_digit(
    tmp_path: Path, ending: str, dtype: torch.dtype, constant: bool
) -> None:
    q = matrix(constant=constant)
    SAVED[ending](q.to(dtype), file := tmp_path / f"q{ending}")
    given = read_rotation(file)
    assert given.name == file.name
    used = rotated(torch.eye(D, dtype=torch.float64), 0, given.kind, 0, constant)
    torch.testing.assert_close(used @ used.T, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-14)
    if constant:
        ones = torch.ones(D, dtype=torch.float64)
        torch.testing.assert_close(used @ ones, ones, rtol=0, atol=1e-14)
    torch.testing.assert_close(used, q, rtol=0, atol=float(torch.finfo(dtype).eps) + 1e-14)


def _pickle_of_code(path: Path) -> None:
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("q.pt", lambda path: None, "no such file"),
    "folder": ("q.npy", lambda path: path.mkdir(), "is a folder"),
    "text": ("q.txt", lambda path: path.write_text("1 0\n0 1\n"), "no tensor file: expected .safetensors, .npy"),
    "no safetensors": ("q.safetensors", lambda path: path.write_bytes(b"nothing at all"), "not a safetensors file"),
    "no array": ("q.npy", lambda path: path.write_bytes(b"nothing at all"), "not a readable file of one NumPy array"),
    "objects": ("q.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "not a readable file of one"),
    "no pickle": ("q.pt", lambda path: path.write_text("hello"), "or truncated: no pickle; download it again"),
    "code": ("q.pt", _pickle_of_code, "wants to run code"),
    "several": (
        "q.pt", lambda path: torch.save({"a": matrix(), "b": matrix(1)}, path),
        r"holds 2 tensors \(a, b\); expected one square matrix",
    ),
    "none": ("q.pt", lambda path: torch.save({"a": 1}, path), "holds no tensor; expected one"),
    "oblong": ("q.pt", lambda path: torch.save(torch.ones(3, 4), path), r"float32 of the shape \[3, 4\]; expected one"),
    "whole numbers": ("q.pt", lambda path: torch.save(torch.eye(3).long(), path), "int64 of the shape"),
    "scaled": ("q.pt", lambda path: torch.save(matrix() * 1.1, path), "Q Q' is 0.21 from the identity.*: give"),
    "infinite": ("q.pt", lambda path: torch.save(matrix() * torch.inf, path), "numbers are not finite; expected one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_rotation_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, make, message = BAD[case]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        read_rotation(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_plan_whose_file_was_not_read_says_so() -> None:
    with pytest.raises(InputError, match=r"sha256:0000.* is not at hand: --rotation FILE names it"):
        rotated(matrix(), 0, "sha256:" + "0" * 64, 0, False)
