"""Orthogonal matrices that a user gives: read from a file, known by its sha256, and never part of a plan.

A plan says ``sha256:...`` where it says ``hadamard`` elsewhere. Whoever applies it names the file again, and what was
read in this process is kept by its content, so that it cannot be taken for another. A stored matrix is orthogonal up to
the rounding of its dtype only; the orthogonal matrix that is nearest to it is used, found in float64.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from normconvert.errors import InputError
from normconvert.files.matrix_file import read_matrix
from normconvert.files.user_paths import user_path
from normconvert.options import ROTATIONS

TOLERANCE = 2.0**-8
"""How far Q Q' may be from the identity in any number, and Q 1 from 1: one unit of bfloat16."""
ROUNDS = 10
"""Steps towards the nearest orthogonal matrix; from the tolerance on two or three are enough."""
KIND = "sha256:"
"""How the kind of a rotation begins that is a matrix of a file."""
_NAMED = re.compile(r"(?P<name>[^/\\]+) (?P<kind>sha256:[0-9a-f]{64})")
Request = TypeVar("Request")


@dataclass(frozen=True)
class Given:
    """A matrix of a file, as options and records tell it: the file's name, and :data:`KIND` with its sha256."""

    name: str
    kind: str

    @property
    def text(self) -> str:
        """Both, as the option ``rotation`` holds them once the file is read."""
        return f"{self.name} {self.kind}"


_READ: dict[str, Tensor] = {}
"""What was read in this process, by the sha256 of the file: content alone, which no other can take the place of."""


def given_in(rotation: str) -> Given | None:
    """The matrix that an option or a record names; None if it is one of :data:`normconvert.options.ROTATIONS`.

    Raises:
        InputError: it is neither.
    """
    if rotation in ROTATIONS:
        return None
    if found := _NAMED.fullmatch(rotation):
        return Given(found["name"], found["kind"])
    raise InputError(f"unknown rotation {rotation!r}; expected {', '.join(ROTATIONS)} or a file")


def read_rotation(path: str | Path) -> Given:
    """Read a matrix, and keep it for the plans that name it.

    Raises:
        InputError: the file is none of one matrix, or the matrix is not orthogonal.
    """
    file = user_path(path)
    matrix, digest = read_matrix(file)
    error = _distance(matrix @ matrix.T, torch.eye(len(matrix), dtype=matrix.dtype))
    if error > TOLERANCE:
        raise InputError(
            f"{file}: not orthogonal: Q Q' is {error:.2g} from the identity, at most {TOLERANCE:.2g}: give the Q of "
            "torch.linalg.qr(matrix), say, or leave --rotation out"
        )
    _READ[f"{KIND}{digest}"] = matrix
    return Given(file.name, f"{KIND}{digest}")


def with_rotation_read(request: Request) -> Request:
    """A request whose option ``rotation`` says what is in the file, if it named one.

    Raises:
        InputError: see :func:`read_rotation`.
    """
    asked: Any = request
    if asked.rotation in ROTATIONS or _NAMED.fullmatch(asked.rotation):
        return request
    if "." not in asked.rotation:
        given_in(asked.rotation)  # no file, but a misspelt choice
    changed: Request = replace(asked, rotation=read_rotation(asked.rotation).text)
    return changed


def size_of(kind: str) -> int:
    """The width of a matrix that was read.

    Raises:
        InputError: it was not.
    """
    return len(matrix_of(kind))


def error_of_ones(kind: str) -> float:
    """How far Q 1 is from 1."""
    matrix = matrix_of(kind)
    ones = torch.ones(len(matrix), dtype=matrix.dtype)
    return _distance(matrix @ ones, ones)


def matrix_of(kind: str) -> Tensor:
    """The matrix as it was read, in float64.

    Raises:
        InputError: it was not read in this process.
    """
    if kind not in _READ:
        short = kind[: len(KIND) + 12]
        raise InputError(
            f"the plan rotates by the matrix of a file ({short}…), which is not at hand: --rotation FILE names it"
        )
    return _READ[kind]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition, by Newton and Schulz's iteration (Higham, 2008, 8.3).

    Raises:
        InputError: the matrix is too far from any.
    """
    one = torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(ROUNDS):
        gram = matrix.T @ matrix
        error = _distance(gram, one)
        # The error is squared each time: behind this step none is left.
        matrix = 1.5 * matrix - 0.5 * (matrix @ gram)
        if error < 1e-8:
            return matrix
    raise InputError(f"the rotation is not orthogonal: {error:.2g} in Q Q' after {ROUNDS} steps towards one that is")


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0
